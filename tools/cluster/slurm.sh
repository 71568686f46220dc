#!/bin/sh
# A real one-node SLURM on this machine, for tests: slurm.sh up FOLDER | down FOLDER.
# Needs root and Debian's slurm-wlm and munge; everything it makes lies in FOLDER.
# Afterwards: export SLURM_CONF=FOLDER/slurm.conf
set -eu
folder=$(realpath -m "$2")

up() {
    mkdir -p "$folder/state" "$folder/spool"
    chmod 755 "$folder"
    dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
    chmod 600 "$folder/munge.key"
    # --force: munged minds who may write to the folders above, which a test's are
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" \
        --seed-file="$folder/munge.seed"
    host=$(hostname -s)
    cat > "$folder/slurm.conf" <<CONF
ClusterName=lorasweep
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_PORT:-26817}
SlurmdPort=$((${SLURM_PORT:-26817} + 1))
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SwitchType=switch/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        state=$(sinfo --noheader --format=%t 2> /dev/null || true)
        [ "$state" = idle ] && echo "SLURM_CONF=$SLURM_CONF" && return
        sleep 1
    done
    echo "the node did not come up: see $folder/*.log" >&2
    down
    return 1
}

down() {
    export SLURM_CONF="$folder/slurm.conf"
    scancel --partition=test 2> /dev/null || true
    for _ in $(seq 50); do  # else the steps outlive the daemon that they report to
        [ -z "$(squeue --noheader --states=all --format=%t 2> /dev/null | grep -E 'R|CG|PD')" ] && break
        sleep 0.2
    done
    sleep 1
    for daemon in slurmd slurmctld munge; do
        pid=$(cat "$folder/$daemon.pid" 2> /dev/null) || continue
        kill "$pid" 2> /dev/null || true
        for _ in $(seq 50); do
            kill -0 "$pid" 2> /dev/null || break
            sleep 0.2
        done
    done
}

"$1"

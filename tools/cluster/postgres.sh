#!/bin/sh
# A real PostgreSQL on this machine, for tests: postgres.sh up FOLDER | down FOLDER.
# Needs Debian's postgresql; the server's data lie in FOLDER. Prints the URI of its
# database for tracking; the study's is the same with _study.
set -eu
folder=$(realpath -m "$2")
port=${POSTGRES_PORT:-25432}
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)

as_owner() { # PostgreSQL refuses to run as root
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid=postgres --regid=postgres --clear-groups "$@"
    else
        "$@"
    fi
}

up() {
    mkdir -p "$folder"
    [ "$(id -u)" != 0 ] || chown postgres:postgres "$folder"
    cd "$folder"
    as_owner "$bin/initdb" --auth=trust --username=lorasweep --encoding=UTF8 -D "$folder/data" \
        > "$folder/initdb.log"
    as_owner "$bin/pg_ctl" -D "$folder/data" -w -l "$folder/data/server.log" \
        -o "-p $port -c listen_addresses=127.0.0.1 -k $folder" start > /dev/null
    for name in lorasweep lorasweep_study; do # MLflow's tables and Optuna's don't share one
        as_owner "$bin/createdb" --host=127.0.0.1 --port="$port" --username=lorasweep "$name"
    done
    echo "postgresql+psycopg://lorasweep@127.0.0.1:$port/lorasweep"
}

down() {
    cd "$folder"
    as_owner "$bin/pg_ctl" -D "$folder/data" -m fast -w stop > /dev/null
}

"$1"

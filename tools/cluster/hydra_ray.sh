#!/bin/sh
# hydra/launcher=ray on a local Ray, tried in a virtual environment of its own, for it can't be
# installed beside lorasweep[cluster]: hydra_ray.sh FOLDER [CACHE_DIR]. The environment and all that
# is made lie in FOLDER. Ends with the two runs that Ray's jobs left in MLflow.
# PYTHON: the interpreter (python3). PIP: options of pip, e.g. an index of torch for the CPU.
# BESIDE: site-packages to take what isn't Ray's from, instead of installing all anew.
set -eu
folder=$(realpath -m "$1")
cache=$(realpath -m "${2:-$folder/cache}")
root=$(realpath "$(dirname "$0")/../..")
bin=$folder/venv/bin

if [ ! -x "$bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$folder/venv"
    if [ -n "${BESIDE:-}" ]; then
        site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$BESIDE" > "$site/zz_beside.pth" # behind what is installed here
        "$bin/pip" install --quiet ${PIP:-} 'hydra-ray-launcher>=1.2.2' 'joblib>=1.5,<1.6' \
            'ray[default]>=2.60' 'hydra-core==1.3.8'
    else
        "$bin/pip" install --quiet ${PIP:-} "$root[ray]"
    fi
fi
cd "$folder"
PYTHONPATH=$root/src RAY_USAGE_STATS_ENABLED=0 "$bin/python" -m lorasweep train -m \
    experiment=demo dataset.num_images=4 dataset.num_holdout=2 trainer.batch_size=3 \
    trainer.max_train_epochs=1 sampling.every_n_epochs=0 metrics.validation.max_tuples=6 \
    adapter.rank=2 "cache_dir=$cache" output_root=outputs seed=0,1 \
    hydra/launcher=ray +hydra.launcher.ray.init.num_cpus=2
PYTHONPATH=$root/src "$bin/python" -c "
from pathlib import Path
from lorasweep import tracking
for one in tracking.candidates(f'sqlite:///{Path.cwd()}/outputs/mlflow.db', 'lorasweep'):
    print(one.run, one.epoch, one.scores['val/loss_rel'])"

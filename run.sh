#!/bin/sh
# The multi-grained Decision Mamba's own door: sh run.sh hopper medium 0 0.85  (env, dataset, CUDA device, alpha_T).
# Further words go on to trainer.py: sh run.sh hopper medium 0 0.85 --preset small
set -eu
if [ $# -lt 4 ]; then
    echo "usage: sh run.sh ENV DATASET CUDA_DEVICE ALPHA_T [flags of trainer.py]" >&2
    exit 2
fi
env=$1 dataset=$2 device=$3 alpha_T=$4
shift 4
set -- trainer.py --agent dm --env "$env" --dataset_type "$dataset" --alpha_T "$alpha_T" "$@"
echo "CUDA_VISIBLE_DEVICES=$device ${PYTHON:-python} $*"
cd "$(dirname "$0")"
CUDA_VISIBLE_DEVICES=$device exec "${PYTHON:-python}" "$@"

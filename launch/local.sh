#!/usr/bin/env bash
# The whole road on this machine: environment, scenes data, pretraining of ViLT (tiny), evaluation, report.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [--short] [--data=DIR] [--workdir=DIR] [--dry-run] [--config.KEY=VALUE ...]

Needs Python 3.11, 3.12 or 3.13 and nothing else. Makes .environment/, writes the scenes data, trains, evaluates and
prints where report.html lies: about ten minutes on two cores after the installation. Start it again to resume a run
that was stopped; when everything is done it says so.

  --data=DIR         prepared data; written when absent (default: data/scenes in the repository)
  --workdir=DIR      files of the run (default: runs/vilt-tiny in the repository)
  --config.KEY=VALUE passed on to vlp_jax.train, e.g. --config.train.steps=2000
  --short            a few steps on few pictures, to see that everything runs
  --dry-run          print the commands only
  PYTHON=/path/to/python3.11 in front chooses the interpreter
TEXT
}

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$PWD
data="" workdir="" short=false dry=false
flags=()
for argument in "$@"; do
    case "$argument" in
        --help | -h) usage && exit 0 ;;
        --short) short=true ;;
        --dry-run) dry=true ;;
        --data=?*) data=${argument#*=} ;;
        --workdir=?*) workdir=${argument#*=} ;;
        --config.*) flags+=("$argument") ;;
        *) echo "unknown argument: $argument" >&2 && usage >&2 && exit 2 ;;
    esac
done

prepare=()
train=()
suffix=""
if $short; then
    suffix=-short
    prepare=(--train=400 --validation=100 --test=100)
    train=(--config.train.steps=20 --config.train.batch_size=32 --config.evaluation.batch_size=32
        --config.evaluation.examples=64 --config.evaluation.gallery=20 --config.evaluation.train_examples=32)
fi
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
data=$(absolute "${data:-$top/data/scenes$suffix}")
workdir=$(absolute "${workdir:-$top/runs/vilt-tiny$suffix}")

cd "$top" # so that python -m finds vlp_jax and configs
stage() {
    if $dry; then echo "would run: $python -m $*" && return; fi
    echo "== python -m $*" >&2
    "$python" -m "$@"
}
if $dry; then option=--dry-run; fi
python=$(bash launch/environment.sh ${option:+"$option"} .environment requirements.txt)
if [ -f "$data/manifest.json" ]; then # written last
    echo "data: $data is there" >&2
else
    stage vlp_jax.prepare scenes --target="$data" ${prepare[@]+"${prepare[@]}"}
fi
stage vlp_jax.train --config=configs/vilt.py:variant=tiny --workdir="$workdir" --config.data.dir="$data" \
    ${train[@]+"${train[@]}"} ${flags[@]+"${flags[@]}"}
if [ -f "$workdir/report.html" ] && [ -z "$(find "$workdir/checkpoints" -newer "$workdir/report.html" 2>&1)" ]; then
    echo "All is done. report: $workdir/report.html"
else
    stage vlp_jax.evaluate --workdir="$workdir" # prints where report.html lies
fi

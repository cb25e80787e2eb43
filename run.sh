#!/usr/bin/env bash
# bash run.sh demo [flags]         fine-tune the tiny base of tests/demo/base in demo/; needs no GPU
# bash run.sh test [pytest flags]  run the tests
# bash run.sh [flags]              the recipe: CogView4-6B, all GPUs, 8 samples a card, 128 a step
#
# Flags are passed on. NUM_GPUS limits the GPUs of each machine; MASTER_PORT is the port where the ranks of the recipe
# meet; a file named hostfile here, or the one that HOSTFILE names, lists several machines in DeepSpeed's format.
# The packages come from the active Python if it has them, otherwise from .venv, which is made when it is missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() { echo "run.sh: $1" >&2; exit 2; }

has_packages() { # the Python $1 satisfies requirements.txt
  [ -x "$(command -v "$1")" ] && "$1" - "$here/requirements.txt" >/dev/null 2>&1 <<'PY'
import importlib.metadata, packaging.requirements, sys
for line in open(sys.argv[1]):
    wanted = packaging.requirements.Requirement(line.split("#")[0].strip())
    assert wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True), line
PY
}

find_python() { # sets $python, and puts its folder into PATH: DeepSpeed calls ninja by name
  local newest
  for python in python python3 "$here/.venv/bin/python"; do
    has_packages "$python" && break
    python=
  done
  if [ -z "$python" ]; then
    for newest in python3.13 python3.12 python3.11 python3 python none; do
      "$newest" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$newest" != none ] || die "no Python 3.11 or newer found"
    echo "run.sh: installing the packages into .venv (6 GB, once)"
    [ -x "$here/.venv/bin/pip" ] || "$newest" -m venv --clear "$here/.venv"
    python=$here/.venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  fi
  python=$("$python" -c 'import sys; print(sys.executable)')
  export PATH="$(dirname "$python"):$PATH"
}

launch() { # runs deepspeed with these arguments; its exit code is ours
  set -m # launcher and ranks get a process group of their own; a signal to this script, also as process 1, goes to all
  "$python" -m deepspeed.launcher.runner "$@" &
  trap 'kill -TERM -- -$!' TERM INT HUP
  while wait $! && code=0 || code=$?; kill -0 -- -$! 2>/dev/null; do sleep 0.2; done # until the last of them is gone
  return "$code"
}

case ${1-} in
demo)
  shift
  case " $*" in *" --output"*) die "the output of the demo is demo/run" ;; esac
  find_python
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # in small products more threads mostly wait for each other
  flags=(--pretrained_model_name_or_path "$here/tests/demo/base" --dataset_name "$here/demo/data"
    --encoded_dir "$here/demo/encoded" --output_dir "$here/demo/run" --resolution 64 --mixed_precision no
    --recompute none --train_batch_size 24 --max_train_steps 580 --learning_rate 1.8e-2 --adam_beta2 0.97
    --lr_warmup_steps 30 --checkpointing_steps 290 --validation_steps 145 --num_inference_steps 20
    --guidance_scale 1 --dataloader_num_workers 1 "$@")
  "$python" "$here/tests/demo/tiny.py" "$here/demo" # makes demo/data if it is missing
  look=(env RANK=0 WORLD_SIZE="${NUM_GPUS:-1}" "$python" "$here/cv4ctrl.py" "${flags[@]}"
    --output_dir "$here/demo/next" --dry_run) # as if nothing had run before
  case " $*" in *" --help"* | *" -h"* | *" --dry"*) exec "${look[@]}" ;; esac
  "${look[@]}" >/dev/null # nothing is moved for a wrong flag, nor away from a run at work
  lock=$here/demo/run/.lock
  [ ! -e "$lock" ] || flock --nonblock "$lock" true || die "another run is at work in demo/run"
  rm -rf "$here/demo/previous" # training starts anew; encoded data are kept
  [ ! -d "$here/demo/run" ] || mv "$here/demo/run" "$here/demo/previous"
  port=$("$python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
  launch --num_gpus="${NUM_GPUS:-1}" --master_port "$port" "$here/cv4ctrl.py" "${flags[@]}"
  "$python" "$here/tests/demo/progress.py" "$here/demo/run" "$here/demo/progress.png"
  echo "run.sh: the run is in demo/run, its pictures side by side in demo/progress.png"
  exit
  ;;
test)
  find_python
  exec "$python" -m pytest "$here/tests" -q "${@:2}"
  ;;
"" | -*) ;;
*) die "$1 is none of demo, test and flags" ;;
esac

hosts=${HOSTFILE:-$here/hostfile}
[ -e "$hosts" ] || [ -z "${HOSTFILE-}" ] || die "there is no HOSTFILE $HOSTFILE"
if [ ! -e "$hosts" ] && [ -z "${NUM_GPUS-}" ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  die "no GPU here; the recipe needs at least one of 80 GB. On this machine try: bash run.sh demo"
fi
find_python
where=(${NUM_GPUS:+--num_gpus="$NUM_GPUS"})
if [ -e "$hosts" ]; then
  where+=(--hostfile "$hosts")
elif [ -n "${NUM_GPUS-}" ] && [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then # DeepSpeed would take cards from 0 on
  where=(--include "localhost:$(cut -d, -f "-$NUM_GPUS" <<<"$CUDA_VISIBLE_DEVICES")")
fi
launch "${where[@]}" ${MASTER_PORT:+--master_port="$MASTER_PORT"} "$here/cv4ctrl.py" \
  --train_batch_size 8 --total_batch_size 128 --max_train_steps 50000 "$@"

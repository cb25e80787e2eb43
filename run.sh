#!/usr/bin/env bash
# bash run.sh demo [flags]         fine-tune the tiny base of tests/base under demo/, on whatever is there
# bash run.sh test [pytest flags]  run the tests
# bash run.sh [flags]              the recipe: CogView4-6B, all GPUs, 8 samples a card, 128 a step; any flag is passed on
#
# NUM_GPUS limits the GPUs (of each machine), MASTER_PORT is where the ranks of the recipe meet; a file named hostfile here, or the one that HOSTFILE names, lists several
# machines as DeepSpeed expects it. Packages come from the active Python if it has them, else from .venv, made when missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

has_packages() { # the Python $1 satisfies requirements.txt
  [ -x "$(command -v "$1")" ] && "$1" - "$here/requirements.txt" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
for line in open(sys.argv[1]):
    wanted = Requirement(line.split("#")[0].strip())
    assert wanted.specifier.contains(version(wanted.name), prereleases=True), line
PY
}

prepare() { # sets $python
  for python in python python3 "$here/.venv/bin/python"; do
    has_packages "$python" && break
    python=
  done
  if [ -z "$python" ]; then
    local newest
    for newest in python3.13 python3.12 python3.11 python3 python; do
      "$newest" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      newest=
    done
    [ -n "$newest" ] || { echo "run.sh: no Python 3.11 or newer found" >&2; exit 2; }
    echo "run.sh: installing the packages into .venv (6 GB, once)"
    [ -x "$here/.venv/bin/pip" ] || "$newest" -m venv --clear "$here/.venv"
    python=$here/.venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  fi
  python=$("$python" -c 'import sys; print(sys.executable)')
  export PATH="$(dirname "$python"):$PATH" # ninja, which DeepSpeed calls by name, is there
}

free_port() { # after a look at the flags "$@" and at who works in their output folder
  PYTHONPATH=$here "$python" - "$@" <<'PY'
import os
import socket
import sys

import cv4ctrl

try:
    config = cv4ctrl.parse()
    cv4ctrl.check(cv4ctrl.resolve(config, int(os.environ.get("NUM_GPUS", 1))))
    lock = os.path.exists(config.output_dir) and cv4ctrl.occupy(config.output_dir)
except cv4ctrl.Ended as end:
    sys.exit(f"run.sh: {end}")
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1])
PY
}

case ${1-} in
"" | -*) ;;
demo)
  shift
  prepare
  case " $*" in *" --output"*) echo "run.sh: the demo's output is demo/run" >&2; exit 2 ;; esac
  flags=(--pretrained_model_name_or_path "$here/tests/base" --dataset_name "$here/demo/data" --encoded_dir "$here/demo/encoded" \
    --output_dir "$here/demo/run" --resolution 64 --mixed_precision no --no_gradient_checkpointing --train_batch_size 24 \
    --max_train_steps 580 --learning_rate 1.8e-2 --adam_beta2 0.97 --lr_warmup_steps 30 --checkpointing_steps 290 \
    --validation_steps 145 --num_inference_steps 20 --guidance_scale 1 --dataloader_num_workers 1 --log_dataset_samples "$@")
  case " $*" in
  *" --help"* | *" -h"* | *" --dry"*)
    "$python" "$here/tests/tiny.py" "$here/demo"
    exec "$python" "$here/cv4ctrl.py" "${flags[@]}"
    ;;
  esac
  port=$(free_port "${flags[@]}") || exit 2 # nothing is moved for a flag that is wrong, nor away from a run at work
  "$python" "$here/tests/tiny.py" "$here/demo"
  rm -rf "$here/demo/previous" # training starts anew; the encoded data are kept
  [ ! -d "$here/demo/run" ] || mv "$here/demo/run" "$here/demo/previous"
  set -m # signals to this script alone are passed on
  "$python" -m deepspeed.launcher.runner --num_gpus="${NUM_GPUS:-1}" --master_port "$port" "$here/cv4ctrl.py" "${flags[@]}" &
  trap 'kill -TERM $!' TERM
  trap 'kill -INT $!' INT
  code=0
  while wait $! && code=0 || code=$?; kill -0 $! 2>/dev/null; do :; done
  [ "$code" = 0 ] || exit "$code"
  exec "$python" "$here/tests/progress.py" "$here/demo/run" "$here/demo/progress.png"
  ;;
test)
  shift
  prepare
  exec "$python" -m pytest "$here/tests" -q "$@"
  ;;
*)
  echo "run.sh: $1 is none of demo, test and flags" >&2
  exit 2
  ;;
esac

hostfile=${HOSTFILE:-$here/hostfile}
if [ ! -e "$hostfile" ] && [ -z "${NUM_GPUS-}" ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "run.sh: no GPU here; the recipe needs one of 80 GB at least. On this machine try: bash run.sh demo" >&2
  exit 2
fi
prepare
launch=(${NUM_GPUS:+--num_gpus="$NUM_GPUS"} ${MASTER_PORT:+--master_port="$MASTER_PORT"})
[ -e "$hostfile" ] && launch+=(--hostfile "$hostfile")
exec "$python" -m deepspeed.launcher.runner "${launch[@]}" "$here/cv4ctrl.py" \
  --train_batch_size 8 --total_batch_size 128 --max_train_steps 50000 "$@"

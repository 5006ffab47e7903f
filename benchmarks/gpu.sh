#!/usr/bin/env bash
# The GPU's tests and benchmarks in one command, within 9 minutes, on a machine with a GPU, torch and triton:
#
#   benchmarks/gpu.sh [OUT.json]        default: benchmarks/results/gpu.json
#
# Kernel tests (where pytest is installed), kernel benchmarks (against transformers where that is), decode steps and
# training steps of Skywork-MoE's real shape. Each stage has a process and a time limit of its own; one that fails or is
# stopped is reported as such, and the next one runs. Prints a table, writes a JSON.
#
# PYTHON   the interpreter that has torch; default python3
# DEVICE   cpu: tiny shapes, only to see that everything runs
set -u

case ${1:-} in # OUT is seen from where the script is called
"" | /*) OUT=${1:-benchmarks/results/gpu.json} ;;
*) OUT=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$PYTHON" - "$DEVICE" <<'PYTHON' || exit 2
import sys
from importlib.util import find_spec
if find_spec("torch") is None:
    sys.exit(f"{sys.executable} has no torch; name an interpreter that has: PYTHON=... benchmarks/gpu.sh")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU; DEVICE=cpu runs tiny shapes, only to see that everything runs")
triton = __import__("triton").__version__ if find_spec("triton") else "none"
gpu = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "none"
print(f"torch {torch.__version__}, triton {triton}, GPU {gpu}", file=sys.stderr)
PYTHON

PARTS=$(mktemp -d)
trap 'rm -rf "$PARTS"' EXIT

stage() { # NAME SECONDS
    echo "$1 (at most $2 s)" >&2
    timeout --kill-after=5 "$2" "$PYTHON" -m moeforge.bench.gpu "$1" --device "$DEVICE" --out "$PARTS/$1.json" ||
        echo "$1: ended with exit code $?" >&2
}

stage kernels 160
stage decode 100
stage train 60
stage tests 180
"$PYTHON" -m moeforge.bench.gpu report "$PARTS" --out "$OUT"

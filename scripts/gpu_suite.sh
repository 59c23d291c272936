#!/usr/bin/env bash
# On a machine with a GPU: the tests marked gpu, then every GPU suite of the benchmarks, in one call.
#
#   bash scripts/gpu_suite.sh              results in benchmarks/results/, or in $OUT where that is set
#   PYTHON=python3.12 bash scripts/gpu_suite.sh
#   QUICK=1 bash scripts/gpu_suite.sh      few rows and rounds
#
# Needs torch with CUDA or ROCm, triton, jinja2, sympy, networkx, typer, rich, safetensors, filelock, platformdirs,
# matplotlib, pytest and hypothesis; transformers only for the tests that use it. Nothing is installed. A suite that
# fails does not keep the others from running; the exit code tells that something failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
results="${OUT:-benchmarks/results}"
mkdir -p "$results"
results="$(cd "$results" && pwd)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 MPLBACKEND=Agg
export TILEWRIGHT_BENCHMARK_RESULTS="$results"
failed=0

"$PYTHON" - <<'EOF' | tee "$results/gpu_machine.txt" || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("no GPU: torch.cuda.is_available() is False")
import triton
name = torch.cuda.get_device_name()
print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}")
EOF

"$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --junitxml="$results/gpu_tests.xml" tests 2>&1 | tee "$results/gpu_tests.txt"
status=${PIPESTATUS[0]}
if [ "$status" -eq 5 ]; then
  echo "no test is marked gpu" | tee -a "$results/gpu_tests.txt"
  failed=1
elif [ "$status" -ne 0 ]; then
  failed=1
fi

for suite in gpu-softmax gpu-attention gpu-decode-cache gpu-quantized-linear; do
  echo "== $suite"
  "$PYTHON" -m tilewright bench "$suite" ${QUICK:+--quick} --plots "$results" 2>&1 | tee "$results/$suite.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "$suite failed"; failed=1; }
done
exit "$failed"

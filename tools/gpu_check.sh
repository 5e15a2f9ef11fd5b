#!/usr/bin/env bash
# Everything that only a GPU can say about the operators, in one go: build for its architecture, all
# CUDA tests, compute-sanitizer, comparisons with the CPU, CUDA graphs, streams, 64-bit sizes, benchmark.
# Needs torch with CUDA, nvcc and pytest; takes under 9 minutes with 16 cores.
#
#     tools/gpu_check.sh [OUT]     logs and results go to OUT (default: output/gpu_check)
#
# Runs every stage even if one fails; exits with an error if any did.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
failed=()

stage() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "=== $name"
  if timeout "$limit" "$@" > "$out/$name.log" 2>&1; then
    echo "=== $name: passed in $((SECONDS - start)) s"
  else
    echo "=== $name: FAILED ($?) in $((SECONDS - start)) s; the end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
    failed+=("$name")
  fi
}

{
  date -u
  git log -1 --format='commit %H' 2> /dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print("torch", torch.__version__, "capability", torch.cuda.get_device_capability())'
} | tee "$out/environment.txt"

stage build 240 env FORCE_CUDA=1 "$python" setup.py build_ext --inplace
stage tests 150 "$python" -m pytest -q -p no:cacheprovider -k cuda tests/test_ops.py
stage device 90 "$python" tools/gpu_check.py
if command -v compute-sanitizer > /dev/null; then
  # The caching allocator would hide accesses between tensors.
  for tool in memcheck racecheck; do
    stage "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
      "$python" tools/gpu_check.py --short
  done
else
  echo "=== compute-sanitizer is not installed: memcheck and racecheck left out" | tee "$out/memcheck.log"
fi
if [[ -f tools/benchmark_ops.py ]]; then
  stage benchmark 150 "$python" tools/benchmark_ops.py --device cuda --quick --dtype bfloat16 \
    --json "$out/benchmark_ops.json" --plot "$out/benchmark_ops.png"
else
  echo "=== there is no tools/benchmark_ops.py yet: no benchmark"
fi

if ((${#failed[@]})); then
  echo "gpu_check: failed after $SECONDS s: ${failed[*]}"
  exit 1
fi
echo "gpu_check: passed in $SECONDS s"

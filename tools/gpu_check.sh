#!/usr/bin/env bash
# Everything that only a GPU can say about the operators, in one go: build for its architecture, all
# CUDA tests, compute-sanitizer, comparisons with the CPU, CUDA graphs, streams, 64-bit sizes,
# torch.compile, benchmark.
# Needs torch with CUDA, nvcc, pytest and pytest-xdist; takes under 10 minutes with 16 cores.
#
#     tools/gpu_check.sh [OUT]     logs and results go to OUT (default: the repository's
#                                  output/gpu_check)
#
# The Python is that of `make setup` if there is one, unless PYTHON names another. Without a GPU, or
# once the build fails, nothing is run; else every stage, even if one fails. Exits with an error if
# any did. OUT/summary.md is the file to send: a row for each thing that is claimed of the kernels,
# the times measured, and the end of the log of each stage that failed.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$repository/output/gpu_check}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
cd "$repository" || exit
python=$repository/.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
# Stages run beside each other; more threads would only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
names=()
unbuilt=

# Without a GPU the tests would be skipped, which pytest counts as passed.
if ! answer=$("$python" -c 'import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} finds no GPU"' 2>&1); then
  echo "gpu_check: expected a Python whose torch finds a GPU, $python says \"${answer##*$'\n'}\":" \
    "run make setup, install the torch of this GPU's driver, or name another Python, as in" \
    "PYTHON=path/to/python $0" >&2
  exit 1
fi

row() { # name, claim, result, seconds
  echo "=== $1: $3, $4 s"
  echo "| $2 | $3 | $4 |" > "$out/$1.row"
}

stage() { # name, limit in seconds, claim, command...; leaves the claim's row in OUT/name.row
  local name=$1 limit=$2 claim=$3 start=$SECONDS result
  shift 3
  if [[ $unbuilt ]]; then
    row "$name" "$claim" "not run: no build" 0
    return
  fi
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  case $? in
    0) result=passed ;;
    77) result="left out: $(tail -n 1 "$out/$name.log")" ;; # LEFT_OUT of tools/gpu_check.py
    *) result="**failed** ($?): $name.log" ;;
  esac
  row "$name" "$claim" "$result" $((SECONDS - start))
}

alone() {
  names+=("$1")
  stage "$@"
}

beside() { # like alone, but does not wait
  names+=("$1")
  stage "$@" &
}

environment() {
  date -u
  git log -1 --format='commit %H' 2> /dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print("torch", torch.__version__, "capability", torch.cuda.get_device_capability())'
}

environment 2>&1 | tee "$out/environment.txt"
alone build 240 "compiles for this GPU" env FORCE_CUDA=1 "$python" setup.py build_ext --inplace
# An older build would pass for this one.
grep -q '| passed |' "$out/build.row" || unbuilt=1
beside tests 300 "every operator's tests on CUDA, in all types and layouts" \
  "$python" -m pytest -q -p no:cacheprovider -n 8 -k cuda tests/test_ops.py
beside cpu 300 "equals the CPU in float64 on the networks' shapes" "$python" tools/gpu_check.py cpu
beside repeat 300 "bitwise repeatable under deterministic algorithms" \
  "$python" tools/gpu_check.py repeat
beside graph 300 "runs on any stream, and captured in a CUDA graph" "$python" tools/gpu_check.py graph
beside large 300 "tensors of more than 2^31 elements" "$python" tools/gpu_check.py large
beside compiled 300 "layers of every kind compile whole, once for all sizes of images" \
  "$python" tools/gpu_check.py compiled
sanitize() { # name, tool, claim, check, options...
  local name=$1 tool=$2 claim="$3 (compute-sanitizer)" check=$4
  shift 4
  if command -v compute-sanitizer > /dev/null; then
    # The caching allocator would hide accesses between tensors, and what was never written.
    beside "$name" 300 "$claim" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 "$@" "$python" tools/gpu_check.py "$check"
  else
    names+=("$name")
    row "$name" "$claim" "not installed" 0
  fi
}

# Of our kernels alone, by their mangled names: in those of cuBLAS racecheck reports races, since it does
# not see the barriers of asynchronous copies; nor does initcheck see what these write.
ours=(--kernel-name kernel_substring=dk4cuda)
sanitize memcheck memcheck "no access out of bounds or misaligned" short
sanitize initcheck initcheck "nothing unwritten is read, depthwise" unwritten
# Two rows: on an H200 racecheck itself dies in the kernels of dense convolutions.
sanitize racecheck racecheck "no race in shared memory, depthwise" unwritten "${ours[@]}"
sanitize racecheck_dense racecheck "no race in shared memory, dense" short "${ours[@]}"
sanitize synccheck synccheck "no barrier that some threads miss" short "${ours[@]}"
wait
for options in "--dtype bfloat16" "--dtype float32" "--dense --dtype bfloat16" "--dense --dtype float32"; do
  name="benchmark ${options//--/}"
  name=${name/dtype /} name=${name// /_}
  # shellcheck disable=SC2086  # options are several words
  alone "$name" 150 "as accurate and as fast as measured below, $options" \
    "$python" tools/benchmark_ops.py --device cuda --quick $options \
    --json "$out/$name.json" --plot "$out/$name.png"
done

mapfile -t failed < <(cd "$out" && grep -l '\*\*failed' "${names[@]/%/.row}" | sed 's/\.row$//')
{
  printf '# What a GPU says of the CUDA kernels\n\n```\n'
  cat "$out/environment.txt"
  printf '```\n\n| claim | result | seconds |\n|---|---|---|\n'
  for name in "${names[@]}"; do cat "$out/$name.row"; done
  printf '\n```\n'
  for name in "${names[@]}"; do [[ $name != benchmark* || $unbuilt ]] || cat "$out/$name.log"; done
  printf '```\n'
  for name in "${failed[@]}"; do
    printf '\nThe end of %s:\n\n```\n' "$name.log"
    tail -n 25 "$out/$name.log"
    printf '```\n'
  done
} > "$out/summary.md"
cat "$out/summary.md"
result="passed in $SECONDS s"
((${#failed[@]} == 0)) || result="failed after $SECONDS s: ${failed[*]}"
echo "gpu_check: $result; please send $out/summary.md"
exit $((${#failed[@]} > 0))

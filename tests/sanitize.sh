#!/usr/bin/env bash
# The kernels under sanitizers: memory and undefined behaviour on tests of the operators, races
# between threads on small shapes. With the Python of the environment that has torch.
#
#     tests/sanitize.sh [address|thread] [cuda|cpu]    default: both of both
#
# cuda: the emulated CUDA kernels (emulation/); cpu: the operators for the CPU (extension/).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
# Python never frees some of what it allocates; torch hands out memory of its own.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1

# The sanitizer must come first in the process, also before Python.
runtime() { "${CXX:-g++}" -print-file-name="lib$1.so"; }

# Of what one instruction set shares with the next, the tests of one will do.
cpu_tests="bounds and not instruction or several_threads or cpu and not dense and not grouped and not multiplier and
  not composed and (by_hand or oracle or test_channels or wide or edges or nan or mask or layouts or
  low_precision)"

# Columns of several tiles are the host's; two types of 16 bits have the same memory.
cuda_tests="not more_columns and not (tensor_cores and bfloat16)"

check() { # sanitizer, device
  local library start=$SECONDS
  case $2 in
    cuda) library=$("$python" -m emulation.build "$1" | tail -n 1) ;;
    cpu) library=$("$python" -m extension.build "$1" | tail -n 1) ;;
  esac
  echo "=== $1, $2: $library"
  local address="$(runtime asan) $(runtime ubsan)" thread
  thread=$(runtime tsan)
  case $1-$2 in
    address-cuda)
      DK_EMULATED_LIBRARY=$library DK_EMULATED_ORDERS=seed1 LD_PRELOAD=$address \
        "$python" -m pytest -q -s -p no:cacheprovider tests/test_csrc_emulated.py -k "$cuda_tests"
      ;;
    address-cpu)
      DK_TEST_EXTENSION=$library LD_PRELOAD=$address \
        "$python" -m pytest -q -s -p no:cacheprovider tests/test_ops.py tests/test_ops_bounds.py \
        -k "$(echo $cpu_tests)"
      ;;
    thread-cuda)
      DK_EMULATED_LIBRARY=$library LD_PRELOAD=$thread "$python" tests/race_check.py dk_emulated
      ;;
    thread-cpu)
      DK_TEST_EXTENSION=$library LD_PRELOAD=$thread "$python" tests/race_check.py dk_detectron
      ;;
  esac
  echo "=== $1, $2: passed in $((SECONDS - start)) s"
}

if [[ ! ${1:-address} =~ ^(address|thread)$ || ! ${2:-cuda} =~ ^(cuda|cpu)$ ]]; then
  echo "$0: expected [address|thread] [cuda|cpu], got $*" >&2
  exit 2
elif (($# == 2)); then
  check "$@"
else  # two at a time, the longest first: each has one thread for most of its time
  printf '%s\n' "address cuda" "thread cuda" "address cpu" "thread cpu" |
    grep "^${1:-.*} " | xargs -P 2 -L 1 tests/sanitize.sh
fi

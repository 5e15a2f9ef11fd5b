#!/usr/bin/env bash
# The emulated CUDA kernels under sanitizers: memory and undefined behaviour on every emulated test,
# races between threads on small shapes. With the Python of the environment that has torch.
#
#     tests/emulation/sanitize.sh [address|thread]...    default: both
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
# The sanitizer must come first in the process, also before Python.
runtime() { "${CXX:-g++}" -print-file-name="lib$1.so"; }

for sanitizer in "${@:-address thread}"; do
  for one in $sanitizer; do
    library=$("$python" tests/emulation/build.py "$one" | tail -n 1)
    echo "=== $one: $library"
    case $one in
      address)
        # Python never frees some of what it allocates; torch hands out memory of its own.
        DK_EMULATED_LIBRARY=$library DK_EMULATED_ORDERS=seed1 \
          LD_PRELOAD="$(runtime asan) $(runtime ubsan)" \
          ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
          UBSAN_OPTIONS=print_stacktrace=1 \
          "$python" -m pytest -q -s -p no:cacheprovider tests/test_csrc_emulated.py
        ;;
      thread)
        DK_EMULATED_LIBRARY=$library LD_PRELOAD=$(runtime tsan) OMP_NUM_THREADS=1 \
          TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
          "$python" tests/emulation/race_check.py
        ;;
    esac
  done
done

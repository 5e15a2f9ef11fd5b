// One type per file, so that they build in parallel.
#include "forward.cuh"

DK_INSTANTIATE_FORWARD(c10::Half)

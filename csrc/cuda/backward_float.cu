// One type per file, so that they build in parallel.
#include "backward.cuh"

DK_INSTANTIATE_BACKWARD(float)

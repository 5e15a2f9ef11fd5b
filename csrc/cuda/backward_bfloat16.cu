// One type per file, so that they build in parallel.
#include "backward.cuh"
#include "backward_matrix.cuh"

DK_INSTANTIATE_BACKWARD(c10::BFloat16)
DK_INSTANTIATE_BACKWARD_MATRIX(c10::BFloat16)

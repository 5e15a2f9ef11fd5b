// One type per file, so that they build in parallel.
#include "forward.cuh"
#include "forward_matrix.cuh"

DK_INSTANTIATE_FORWARD(c10::Half)
DK_INSTANTIATE_FORWARD_MATRIX(c10::Half)

// One type per file, so that they build in parallel.
#include "dense_matrix.cuh"

DK_INSTANTIATE_DENSE_MATRIX(c10::Half)

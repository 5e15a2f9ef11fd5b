// One type per file, so that they build in parallel.
#include "columns.cuh"

DK_INSTANTIATE_COLUMNS(c10::BFloat16)

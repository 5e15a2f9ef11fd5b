// The kernels for any processor; on x86-64, SSE2. Of one type per file, so that they build in
// parallel.
#pragma once
// Four doubles are no register here, but nothing that takes or returns them is a call.
#pragma GCC diagnostic ignored "-Wpsabi"
#define DK_ISA baseline
#define DK_VECTOR_BYTES 16
#include "dense_kernels.h"
#include "depthwise_kernels.h"

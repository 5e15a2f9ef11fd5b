// The depthwise kernels for any processor; on x86-64, SSE2.
#define DK_ISA baseline
#define DK_VECTOR_BYTES 16
#include "depthwise_kernels.h"

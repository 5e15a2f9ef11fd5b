// The kernels for AVX2, of one type per file, so that they build in parallel. The target covers
// only what follows the other headers, so that no inline function of theirs is compiled for a
// processor that may not be there.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define DK_ISA avx2
#define DK_VECTOR_BYTES 32
#include "dense_kernels.h"
#include "depthwise_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

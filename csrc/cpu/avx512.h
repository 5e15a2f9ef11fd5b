// The kernels for AVX-512, of one type per file, so that they build in parallel. The target covers
// only what follows the other headers, so that no inline function of theirs is compiled for a
// processor that may not be there.
#pragma once
#if defined(__x86_64__)
// GCC 12 warns of its own _mm512_undefined_* (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define DK_ISA avx512
#define DK_VECTOR_BYTES 64
#include "dense_kernels.h"
#include "depthwise_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

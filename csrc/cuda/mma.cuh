// What there is from sm_80 on: matrix products of one warp on tensor cores, PTX's mma.m16n8k16 and
// movmatrix; and copies to shared memory that go on beside other work, cp.async.
//
// Of a product, thread `lane` is (g, q) = (lane / 4, lane % 4). A register holds two numbers of 16
// bits, the first one in its lower half.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tiles.cuh"

namespace dk {
namespace cuda {

DK_INLINE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The first or the second of two packed numbers.
template <typename half_t>
DK_INLINE float unpacked(uint32_t word, int which) {
  if constexpr (std::is_same_v<half_t, c10::BFloat16>) {
    return float_of_bits(which ? word & 0xffff0000u : word << 16);
  }
  c10::Half half;
  half.x = static_cast<unsigned short>(which ? word >> 16 : word);
  return static_cast<float>(half);
}

// Two numbers in a register, rounded to half_t.
template <typename half_t>
DK_INLINE uint32_t packed(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<half_t, c10::BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
#else
  return static_cast<uint32_t>(half_t(first).x) | static_cast<uint32_t>(half_t(second).x) << 16;
#endif
}

// a * b + c of the numbers in three registers, rounded to half_t.
template <typename half_t>
DK_INLINE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<half_t, c10::BFloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  }
  return word;
#else
  const auto sum = [&](int which) {
    return unpacked<half_t>(a, which) * unpacked<half_t>(b, which) + unpacked<half_t>(c, which);
  };
  return packed<half_t>(sum(0), sum(1));
#endif
}

// Products of the numbers in two registers, rounded to bfloat16: plus -0, as multiplication alone
// takes sm_90.
DK_INLINE uint32_t multiplied(uint32_t a, uint32_t b) {
  return multiply_add<c10::BFloat16>(a, b, 0x80008000u);
}

// The first or the second of two packed numbers, twice.
DK_INLINE uint32_t doubled(uint32_t word, int which) {
#if defined(__CUDA_ARCH__)
  uint16_t half[2];  // unpacked so, since ptxas lets arithmetic read one half twice
  uint32_t two;
  asm("mov.b32 {%0, %1}, %2;" : "=h"(half[0]), "=h"(half[1]) : "r"(word));
  asm("mov.b32 %0, {%1, %1};" : "=r"(two) : "h"(half[which]));
  return two;
#else
  return (which ? word >> 16 : word & 0xffffu) * 0x10001u;
#endif
}

#ifndef DK_EMULATED_MMA
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// d += a * b, where
//   a [16, 16]  rows g, g + 8, g, g + 8, at columns 2q, 2q, 2q + 8, 2q + 8 and the next
//   b [16, 8]   rows 2q, 2q + 8 and the next, of column g
//   d [16, 8]   row g, at columns 2q and 2q + 1; row g + 8, the same
template <typename half_t>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<half_t, c10::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Of an [8, 8] matrix whose row g, columns 2q and 2q + 1, a thread holds: the same of its
// transpose.
__device__ __forceinline__ uint32_t transposed(uint32_t rows) {
  uint32_t columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

// Starts copying 16 bytes from global to shared memory, or writing zeros there.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool reads) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(reads ? 16 : 0)
               : "memory");
}

// Until all that this thread has started is there, for itself.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

#else  // so that kernels compile for what they are not launched on

template <typename half_t>
__device__ void mma(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {
  __trap();
}

__device__ inline uint32_t transposed(uint32_t) {
  __trap();
  return 0;
}

__device__ inline void copy_async(void*, const void*, bool) { __trap(); }

__device__ inline void wait_for_copies() { __trap(); }
#endif
#endif

}  // namespace cuda
}  // namespace dk

// Bilinear sampling along one axis: the only copy of eq. 12 and eq. 13, shared by CPU and CUDA.
//
// A location x on an axis of `size` cells reads the two cells around it. Both are returned as valid
// indices, so a caller never has to ask whether it may read; a cell that lies outside the axis has
// zero coefficient and zero derivative instead (so an infinite value of cell 0 makes a NaN there).
// In two dimensions
//
//   value            = sum_ij h.coef[i] * w.coef[j] * grid[h.cell[i], w.cell[j]]
//   d value / d(h.x) = sum_ij h.grad[i] * w.coef[j] * grid[h.cell[i], w.cell[j]]
//
// A NaN location makes coefficients NaN (the output shows it) but reads cell 0.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DK_INLINE __host__ __device__ __forceinline__
#else
#define DK_INLINE inline __attribute__((always_inline))
#endif

namespace dk {

template <typename T>
struct AxisSample {
  int cell[2];
  T coef[2];
  T grad[2];
};

// `cell` is the lower of the two cells, `slope` is d(location clipped) / d(location).
template <typename T>
DK_INLINE AxisSample<T> sample_cells(T x, int lower, int size, T slope) {
  const bool low = lower >= 0 && lower < size;
  const bool high = lower + 1 >= 0 && lower + 1 < size;
  const T fraction = x - T(lower);
  AxisSample<T> s;
  s.cell[0] = low ? lower : 0;
  s.cell[1] = high ? lower + 1 : 0;
  s.coef[0] = low ? T(1) - fraction : T(0);
  s.coef[1] = high ? fraction : T(0);
  s.grad[0] = low ? -slope : T(0);
  s.grad[1] = high ? slope : T(0);
  return s;
}

// floor(x) for x in [-1, size], a cell outside for anything further away, 0 for NaN.
template <typename T>
DK_INLINE int floor_cell(T x, int size) {
  const T low = x > T(-2) ? x : T(-2);
  const T bounded = low < T(size) ? low : T(size);
  return x == x ? static_cast<int>(std::floor(bounded)) : 0;
}

// A location in the scope of a kernel (eq. 7). `clip` keeps it inside [0, size - 1], with the
// gradient of torch.clamp. At x = size - 1 the derivative is that of the last cell pair, which eq.
// 13 as printed loses: without it, training from zero offsets is stuck when scope and kernel are
// equal.
template <typename T>
DK_INLINE AxisSample<T> sample_scope(T x, int size, bool clip) {
  const T last = T(size - 1);
  T slope = T(1);
  if (clip) {
    // A scope of one cell is constant along the axis.
    slope = x >= T(0) && x <= last && size > 1 ? T(1) : T(0);
    x = x < T(0) ? T(0) : x;
    x = x > last ? last : x;
  }
  const int lower = floor_cell(x, size);
  return sample_cells(x, x == last && size > 1 ? size - 2 : lower, size, slope);
}

// A location in the image (eq. 9): zero outside, as in torchvision.ops.deform_conv2d.
template <typename T>
DK_INLINE AxisSample<T> sample_image(T x, int size) {
  return sample_cells(x, floor_cell(x, size), size, T(1));
}

}  // namespace dk

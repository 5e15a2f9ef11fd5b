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
//
// T is a floating point number or, on the CPU, a vector of them: every condition is a choice of
// values, and both are always computed.
#pragma once

#if defined(__CUDACC__)
#define DK_INLINE __host__ __device__ __forceinline__
#else
#define DK_INLINE inline __attribute__((always_inline))
#endif

namespace dk {

// Numbers<T>: the type of one element of T, of a cell's index, and the conversions between them.
template <typename T>
struct Numbers {
  using element = T;
  using integer = int;
  static DK_INLINE int truncate(T x) { return static_cast<int>(x); }
  static DK_INLINE T convert(int i) { return static_cast<T>(i); }
};

template <typename T>
struct AxisSample {
  typename Numbers<T>::integer cell[2];
  T coef[2];
  T grad[2];
};

// `lower` is the lower of the two cells; `slope` is 0 where the value does not depend on x, else 1.
template <typename T>
DK_INLINE AxisSample<T> sample_cells(T x, typename Numbers<T>::integer lower, int size, T slope) {
  const T zero{};
  const auto low = (lower >= 0) & (lower < size);
  const auto high = (lower >= -1) & (lower < size - 1);
  const T fraction = x - Numbers<T>::convert(lower);
  AxisSample<T> s;
  s.cell[0] = low ? lower : 0;
  s.cell[1] = high ? lower + 1 : 0;
  s.coef[0] = low ? 1 - fraction : zero;
  s.coef[1] = high ? fraction : zero;
  s.grad[0] = low ? -slope : zero;
  s.grad[1] = high ? slope : zero;
  return s;
}

// floor(x) for x in [-1, size], a cell outside for anything further away, 0 for NaN.
template <typename T>
DK_INLINE typename Numbers<T>::integer floor_cell(T x, int size) {
  const T zero{}, least = zero - 2, most = zero + typename Numbers<T>::element(size);
  x = x == x ? x : zero;
  x = x > least ? x : least;
  x = x < most ? x : most;
  const auto cell = Numbers<T>::truncate(x);
  return x < Numbers<T>::convert(cell) ? cell - 1 : cell;
}

// Where a location reads the scope of a kernel (eq. 7): itself, the lower cell, and the slope.
template <typename T>
struct ScopeLocation {
  T x;
  typename Numbers<T>::integer lower;
  T slope;
};

// `clip` reads [0, size - 1] only: a location outside reads the cell at the edge, and has the
// derivative towards the cell next to it, for `inward` to decide on. At x = size - 1 the derivative
// is that of the last cell pair, which eq. 13 as printed loses: without it, training from zero
// offsets is stuck when scope and kernel are equal.
template <typename T>
DK_INLINE ScopeLocation<T> find_in_scope(T x, int size, bool clip) {
  const T zero{}, one = zero + 1, last = zero + typename Numbers<T>::element(size - 1);
  T slope = one;
  if (clip) {
    // A scope of one cell is constant along the axis.
    slope = size > 1 ? one : zero;
    x = x < zero ? zero : x;
    x = x > last ? last : x;
  }
  auto lower = floor_cell(x, size);
  if (size > 1) lower = x == last ? lower - 1 : lower;
  return {x, lower, slope};
}

template <typename T>
DK_INLINE AxisSample<T> sample_scope(T x, int size, bool clip) {
  const auto at = find_in_scope(x, size, clip);
  return sample_cells(at.x, at.lower, size, at.slope);
}

// The gradient of a clipped location x, given `grad`, that of the edge which it reads if it is
// outside: 0 if descent would move x further out, else `grad`. The true derivative is 0 everywhere
// outside, and a tap would never come back. `grad` must be the whole sum over all that reads the
// tap: the sign of a part decides nothing.
template <typename T>
DK_INLINE T inward(T x, int size, T grad) {
  const T zero{}, last = zero + typename Numbers<T>::element(size - 1);
  const auto outward = ((x < zero) & (grad > zero)) | ((x > last) & (grad < zero));
  return outward ? zero : grad;
}

// A location in the image (eq. 9): zero outside, as in torchvision.ops.deform_conv2d.
template <typename T>
DK_INLINE AxisSample<T> sample_image(T x, int size) {
  return sample_cells(x, floor_cell(x, size), size, T{} + 1);
}

}  // namespace dk

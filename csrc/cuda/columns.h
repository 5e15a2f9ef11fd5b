// What the CUDA host functions (dense_cuda.h) hand to the kernels of convolutions that are not
// depthwise (columns.cuh). Plain C++: read by both compilers.
#pragma once

#include "depthwise.h"

namespace dk {
namespace cuda {

// A tile of columns (csrc/dense.h): `count` output pixels from `first` on, of all N * H_out *
// W_out. The input is channels_last.
template <typename scalar_t>
struct ColumnsTile {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  Offset<const T> kernel_offset, data_offset;
  int64_t first, count;
  int pixels;  // of a block
};

template <typename scalar_t>
struct ColumnsArgs : ColumnsTile<scalar_t> {
  scalar_t* columns;  // [groups, count, cells, C / groups], to be written
};

template <typename scalar_t>
struct ColumnsBackwardArgs : ColumnsTile<scalar_t> {
  using T = opmath_t<scalar_t>;
  const scalar_t* grad_columns;                    // [groups, count, cells, C / groups]
  T* grad_taps;                                    // [count, taps, C], of what each tap reads
  Offset<T> grad_kernel_offset, grad_data_offset;  // zero at the start
  T* grad_input;                                   // channels_last, added to; zero at the start
  int lanes;                                       // threads that share a pixel
};

// Neighbouring channels of one group that a thread takes: so many, or one.
template <typename T>
constexpr int kColumnsVector = 16 / sizeof(T);

// Bytes of shared memory, and where its arrays begin, all of them [pixels, taps]:
//   kernel_coef, data_coef     Vector<T, 4>  if there is such an offset
//   kernel_sum, data_sum       Vector<T, 4>  their gradients; backward only
//   index                      TapIndex      its cell is that of the scope itself
struct ColumnsLayout {
  size_t kernel_coef, data_coef, kernel_sum, data_sum, index, bytes;
};

template <typename T>
DK_INLINE ColumnsLayout columns_layout(int pixels, int taps, bool kernel, bool data,
                                       bool backward) {
  const size_t pairs = static_cast<size_t>(pixels) * taps, coef = sizeof(T) * 4 * pairs;
  ColumnsLayout s;
  s.kernel_coef = 0;
  s.data_coef = s.kernel_coef + (kernel ? coef : 0);
  s.kernel_sum = s.data_coef + (data ? coef : 0);
  s.data_sum = s.kernel_sum + (kernel && backward ? coef : 0);
  s.index = s.data_sum + (data && backward ? coef : 0);
  s.bytes = s.index + sizeof(TapIndex) * pairs;
  return s;
}

// ---- launchers, one instantiation per type in its own .cu ---------------------------------------

template <typename scalar_t>
void launch_columns(const ColumnsArgs<scalar_t>& a, cudaStream_t stream);
// The gradients of the tile's offsets, and grad_taps.
template <typename scalar_t>
void launch_columns_backward(ColumnsBackwardArgs<scalar_t> a, cudaStream_t stream);
// Without data_offset: adds grad_taps to the pixels that the taps read, of input rows
// begin .. end of all N * H.
template <typename scalar_t>
void launch_add_taps(const ColumnsBackwardArgs<scalar_t>& a, int64_t begin, int64_t end,
                     cudaStream_t stream);
// With data_offset: the same by atomics.
template <typename scalar_t>
void launch_scatter_taps(const ColumnsBackwardArgs<scalar_t>& a, cudaStream_t stream);
// The same in two steps around a stable sort, in a fixed order: base[i*taps + t] = the first of the
// 2x2 pixels that tap t of the tile's pixel i reads; then every input pixel gathers.
template <typename scalar_t>
void launch_tap_bases(const ColumnsBackwardArgs<scalar_t>& a, int64_t* base, cudaStream_t stream);
template <typename scalar_t>
void launch_gather_taps(const ColumnsBackwardArgs<scalar_t>& a, const int64_t* sorted_base,
                        const int64_t* pair, cudaStream_t stream);

}  // namespace cuda
}  // namespace dk

// Kernels of convolutions that are not depthwise: what goes into the matrix product of
// csrc/dense.h, and what comes back. Shapes: tiles.cuh, columns.h.
#pragma once

#include "tiles.cuh"  // first, since it has headers of torch that must be

#include "columns.h"

namespace dk {
namespace cuda {

// Where the cells of channel c of the tile's pixel i begin.
template <typename Args>
DK_INLINE int64_t column_offset(const Args& a, int cells, int64_t i, int c) {
  const int size = static_cast<int>(a.params.channels / a.params.groups), group = c / size;
  return ((group * a.count + i) * size + c - group * size) * cells;
}

// What a tap of a pixel reads: nothing (-1) or the pixel of image n, here without a data_offset.
template <typename Sizes>
DK_INLINE int rest_pixel(const ConvParams& p, const Sizes& size, int t, int h, int w) {
  const int y = rest_position(h, p.stride_h, p.pad_h, t / size.kernel_w, p.dilation_h);
  const int x = rest_position(w, p.stride_w, p.pad_w, t % size.kernel_w, p.dilation_w);
  const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
  return inside ? static_cast<int>(y * p.in_w + x) : -1;
}

// ---- columns ------------------------------------------------------------------------------------

// A block: some pixels, 32 channels. Its threads first make, for each pixel and tap, a row of
// coefficients of all cells. Then a warp takes a pixel, a thread one channel, and sums up all its
// cells (S known) or four at a time in registers: the rows are the same for the whole warp.
template <typename scalar_t, int K, int S, bool kKernel, bool kData>
__global__ void __launch_bounds__(kThreads) columns_kernel(const ColumnsArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const ColumnsLayout layout = columns_layout<T>(a.pixels, taps, cells, kKernel, kData);
  auto* data_coef = reinterpret_cast<Vector<T, 4>*>(memory + layout.data_coef);
  T* table = reinterpret_cast<T*>(memory + layout.table);
  int* pixel = reinterpret_cast<int*>(memory + layout.pixel);

  // The channels of one tile of pixels run next to each other: its offsets stay in cache.
  const int channel_tiles = (channels + kWarpSize - 1) / kWarpSize;
  const int64_t begin = static_cast<int64_t>(blockIdx.x / channel_tiles) * a.pixels;
  const int count = static_cast<int>(a.count - begin < a.pixels ? a.count - begin : a.pixels);
  const PixelTile tile(a.first + begin, p.batch, p.out_h, p.out_w);
  const int image = static_cast<int>(p.in_h * p.in_w);
  for (int j = threadIdx.x; j < count * taps; j += blockDim.x) {
    const int t = j % taps;
    const Pixel q = tile[j / taps];
    const int64_t n = tile.first_image + q.n;
    if constexpr (kData) {
      const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
      pixel[j] = q.n * image + sample.h.cell * static_cast<int>(p.in_w) + sample.w.cell;
      data_coef[j] = sample.coef();
    } else {
      const int at = rest_pixel(p, size, t, q.h, q.w);
      pixel[j] = at < 0 ? -1 : q.n * image + at;
    }
    if constexpr (kKernel) {
      const auto sample = sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w);
      const Vector<T, 4> coef = sample.coef();
      const Steps steps(size.scope_h, size.scope_w, 1);
      T* row = table + static_cast<int64_t>(j) * layout.row;
      for (int cell = 0; cell < layout.row; ++cell) row[cell] = T(0);
      T* first = row + sample.h.cell * size.scope_w + sample.w.cell;
      DK_UNROLL
      for (int k = 0; k < 4; ++k) first[steps[k]] += coef.v[k];
    }
  }
  __syncthreads();

  const int c = static_cast<int>(blockIdx.x % channel_tiles) * kWarpSize + threadIdx.x % kWarpSize;
  if (c >= channels) return;
  const scalar_t* input = a.input + tile.first_image * p.in_h * p.in_w * channels + c;
  const Steps pixel_steps(p.in_h, p.in_w, channels);
  const auto value = [&](int j) {
    if (!kData && pixel[j] < 0) return T(0);
    const scalar_t* from = input + static_cast<int64_t>(pixel[j]) * channels;
    if constexpr (!kData) return static_cast<T>(*from);
    T x = T(0);
    DK_UNROLL
    for (int k = 0; k < 4; ++k) x += data_coef[j].v[k] * static_cast<T>(from[pixel_steps[k]]);
    return x;
  };
  constexpr int N = S ? S * S : 4;
  for (int i = threadIdx.x / kWarpSize; i < count; i += blockDim.x / kWarpSize) {
    scalar_t* to = a.columns + column_offset(a, cells, begin + i, c);
    if constexpr (!kKernel) {
      for (int t = 0; t < taps; ++t) to[t] = static_cast<scalar_t>(value(i * taps + t));
    } else {
      for (int cell = 0; cell < cells; cell += N) {
        T sum[N] = {};
        DK_UNROLL
        for (int t = 0; t < taps; ++t) {
          const T x = value(i * taps + t);
          const T* row = table + static_cast<int64_t>(i * taps + t) * layout.row + cell;
          DK_UNROLL
          for (int k = 0; k < N; ++k) sum[k] += x * row[k];
        }
        DK_UNROLL
        for (int k = 0; k < N; ++k) {
          if (S || cell + k < cells) to[cell + k] = static_cast<scalar_t>(sum[k]);
        }
      }
    }
  }
}

// ---- offsets, and what the taps read ------------------------------------------------------------

// Over the threads of a warp, each of which gets it.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  T v[1] = {x};
  return fold_sum(v, kWarpSize);
}

// A warp takes an output pixel, and all of its channels: a sum over them is the whole one, which
// can be turned inward at once.
template <typename scalar_t, bool kKernel, bool kData>
__global__ void __launch_bounds__(kThreads)
    columns_backward_kernel(const ColumnsBackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int64_t i =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (i >= a.count) return;
  const int lane = threadIdx.x % kWarpSize, taps = size.taps();
  const int channels = static_cast<int>(p.channels);
  const Steps cell_steps(size.scope_h, size.scope_w, 1), pixel_steps(p.in_h, p.in_w, channels);
  for (int t = 0; t < taps; ++t) {
    int64_t n;
    int tap;
    const Pixel q = pixel_of_pair(p, size, (a.first + i) * taps + t, &n, &tap);
    TapSample<T> weight{}, data{};
    int cell = t, pixel = 0;
    if constexpr (kKernel) {
      weight = sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w);
      cell = weight.h.cell * size.scope_w + weight.w.cell;
    }
    if constexpr (kData) {
      data = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
      pixel = data.h.cell * static_cast<int>(p.in_w) + data.w.cell;
    } else {
      pixel = rest_pixel(p, size, t, q.h, q.w);
      if (pixel < 0) continue;
    }
    const scalar_t* input = a.input + (n * p.in_h * p.in_w + pixel) * channels;
    const Vector<T, 4> weight_coef = weight.coef(), data_coef = data.coef();
    Vector<T, 4> grad_weight_coef{}, grad_data_coef{};
    for (int c = lane; c < channels; c += kWarpSize) {
      const scalar_t* grad = a.grad_columns + column_offset(a, size.cells(), i, c) + cell;
      T x = T(0), grad_tap = T(0), pixels[4];
      if constexpr (kData) {
        DK_UNROLL
        for (int k = 0; k < 4; ++k) {
          pixels[k] = static_cast<T>(input[pixel_steps[k] + c]);
          x += data_coef.v[k] * pixels[k];
        }
      } else {
        x = static_cast<T>(input[c]);
      }
      if constexpr (kKernel) {
        DK_UNROLL
        for (int k = 0; k < 4; ++k) {
          const T g = static_cast<T>(grad[cell_steps[k]]);
          grad_tap += weight_coef.v[k] * g;
          grad_weight_coef.v[k] += x * g;
        }
      } else {
        grad_tap = static_cast<T>(*grad);
      }
      if constexpr (kData) {
        DK_UNROLL
        for (int k = 0; k < 4; ++k) grad_data_coef.v[k] += grad_tap * pixels[k];
      }
      a.grad_taps[(i * taps + t) * channels + c] = grad_tap;
    }
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      if constexpr (kKernel) grad_weight_coef.v[k] = warp_sum(grad_weight_coef.v[k]);
      if constexpr (kData) grad_data_coef.v[k] = warp_sum(grad_data_coef.v[k]);
    }
    if (lane) continue;
    if constexpr (kKernel) {
      T h = weight.grad_h(grad_weight_coef), w = weight.grad_w(grad_weight_coef);
      if (p.clip) {
        const auto location = locate_in_scope(size, a.kernel_offset, n, t, q.h, q.w);
        h = inward(location.h, size.scope_h, h);
        w = inward(location.w, size.scope_w, w);
      }
      T* to = offset_of(a.grad_kernel_offset, n, t, q.h, q.w);
      to[0] = h;
      to[a.grad_kernel_offset.strides.c] = w;
      if (a.kernel_offset.modulated) {
        *factor_of(a.grad_kernel_offset, taps, n, t, q.h, q.w) =
            weight.grad_factor(grad_weight_coef);
      }
    }
    if constexpr (kData) {
      T* to = offset_of(a.grad_data_offset, n, t, q.h, q.w);
      to[0] = data.grad_h(grad_data_coef);
      to[a.grad_data_offset.strides.c] = data.grad_w(grad_data_coef);
      if (a.data_offset.modulated) {
        *factor_of(a.grad_data_offset, taps, n, t, q.h, q.w) = data.grad_factor(grad_data_coef);
      }
    }
  }
}

// ---- input --------------------------------------------------------------------------------------

// One thread per input pixel and channel, which adds up the taps that read it.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    add_taps_kernel(const ColumnsBackwardArgs<scalar_t> a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels);
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t pixel = begin * p.in_w + element / channels;
  if (pixel >= end * p.in_w) return;
  const int c = static_cast<int>(element % channels);
  const int64_t line = pixel / p.in_w, n = line / p.in_h;
  const int y = static_cast<int>(line % p.in_h), x = static_cast<int>(pixel % p.in_w);
  T sum = T(0);
  for (int t = 0; t < size.taps(); ++t) {
    const int row = fed_output(y, p.pad_h, t / size.kernel_w, p.dilation_h, p.stride_h, p.out_h);
    const int column = fed_output(x, p.pad_w, t % size.kernel_w, p.dilation_w, p.stride_w, p.out_w);
    const int64_t i = (n * p.out_h + row) * p.out_w + column - a.first;
    if (row < 0 || column < 0 || i < 0 || i >= a.count) continue;
    sum += a.grad_taps[(i * size.taps() + t) * channels + c];
  }
  a.grad_input[pixel * channels + c] += sum;
}

// One thread per tap of an output pixel and channel.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    scatter_taps_kernel(const ColumnsBackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels);
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= a.count * size.taps() * channels) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, a.first * size.taps() + element / channels, &n, &t);
  const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
  const Vector<T, 4> coef = sample.coef();
  const Steps steps(p.in_h, p.in_w, channels);
  T* to = a.grad_input + ((n * p.in_h + sample.h.cell) * p.in_w + sample.w.cell) * channels +
          element % channels;
  DK_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (coef.v[k] != T(0)) atomicAdd(to + steps[k], coef.v[k] * a.grad_taps[element]);
  }
}

template <typename scalar_t>
__global__ void tap_bases_kernel(const ColumnsBackwardArgs<scalar_t> a, int64_t* base) {
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= a.count * size.taps()) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, a.first * size.taps() + pair, &n, &t);
  const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
  base[pair] = (n * p.in_h + sample.h.cell) * p.in_w + sample.w.cell;
}

// One thread per input pixel and channel: adds, in sorted order, what the pairs send here whose 2x2
// block begins at this pixel, left of it, above it, and above left of it.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    gather_taps_kernel(const ColumnsBackwardArgs<scalar_t> a, const int64_t* sorted_base,
                       const int64_t* pair) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels);
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t pixel = element / channels;
  if (pixel >= p.batch * p.in_h * p.in_w) return;
  const int c = static_cast<int>(element % channels);
  const int64_t pairs = a.count * size.taps();
  const int x = static_cast<int>(pixel % p.in_w), y = static_cast<int>(pixel / p.in_w % p.in_h);
  T sum = T(0);
  DK_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (y < k / 2 || x < k % 2) continue;
    const int64_t base = pixel - k / 2 * p.in_w - k % 2;
    for (int64_t e = lower_bound(sorted_base, pairs, base); e < pairs && sorted_base[e] == base;
         ++e) {
      int64_t n;
      int t;
      const Pixel q = pixel_of_pair(p, size, a.first * size.taps() + pair[e], &n, &t);
      const T coef = sample_data(p, size, a.data_offset, n, t, q.h, q.w).coef().v[k];
      if (coef != T(0)) sum += coef * a.grad_taps[pair[e] * channels + c];
    }
  }
  a.grad_input[element] += sum;
}

// ---- launches -----------------------------------------------------------------------------------

inline int64_t blocks_of(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

template <typename scalar_t>
void launch_columns(const ColumnsArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const int64_t blocks =
      (a.count + a.pixels - 1) / a.pixels * ((p.channels + kWarpSize - 1) / kWarpSize);
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    const size_t bytes =
        columns_layout<opmath_t<scalar_t>>(a.pixels, p.taps(), p.cells(), kKernel, kData).bytes;
    dispatch_sizes<kKernel>(p, [&](auto k, auto s) {
      launch(columns_kernel<scalar_t, decltype(k)::value, decltype(s)::value, kKernel, kData>,
             blocks, kThreads, bytes, stream, a);
    });
  });
}

template <typename scalar_t>
void launch_columns_backward(const ColumnsBackwardArgs<scalar_t>& a, cudaStream_t stream) {
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    launch(columns_backward_kernel<scalar_t, decltype(kernel)::value, decltype(data)::value>,
           blocks_of(a.count * kWarpSize), kThreads, 0, stream, a);
  });
}

template <typename scalar_t>
void launch_add_taps(const ColumnsBackwardArgs<scalar_t>& a, int64_t begin, int64_t end,
                     cudaStream_t stream) {
  const int64_t elements = (end - begin) * a.params.in_w * a.params.channels;
  launch(add_taps_kernel<scalar_t>, blocks_of(elements), kThreads, 0, stream, a, begin, end);
}

template <typename scalar_t>
void launch_scatter_taps(const ColumnsBackwardArgs<scalar_t>& a, cudaStream_t stream) {
  const int64_t elements = a.count * a.params.taps() * a.params.channels;
  launch(scatter_taps_kernel<scalar_t>, blocks_of(elements), kThreads, 0, stream, a);
}

template <typename scalar_t>
void launch_tap_bases(const ColumnsBackwardArgs<scalar_t>& a, int64_t* base, cudaStream_t stream) {
  launch(tap_bases_kernel<scalar_t>, blocks_of(a.count * a.params.taps()), kThreads, 0, stream, a,
         base);
}

template <typename scalar_t>
void launch_gather_taps(const ColumnsBackwardArgs<scalar_t>& a, const int64_t* sorted_base,
                        const int64_t* pair, cudaStream_t stream) {
  const ConvParams& p = a.params;
  launch(gather_taps_kernel<scalar_t>, blocks_of(p.batch * p.in_h * p.in_w * p.channels), kThreads,
         0, stream, a, sorted_base, pair);
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_COLUMNS(scalar_t)                                                        \
  namespace dk {                                                                                \
  namespace cuda {                                                                              \
  template void launch_columns(const ColumnsArgs<scalar_t>&, cudaStream_t);                     \
  template void launch_columns_backward(const ColumnsBackwardArgs<scalar_t>&, cudaStream_t);    \
  template void launch_add_taps(const ColumnsBackwardArgs<scalar_t>&, int64_t, int64_t,         \
                                cudaStream_t);                                                  \
  template void launch_scatter_taps(const ColumnsBackwardArgs<scalar_t>&, cudaStream_t);        \
  template void launch_tap_bases(const ColumnsBackwardArgs<scalar_t>&, int64_t*, cudaStream_t); \
  template void launch_gather_taps(const ColumnsBackwardArgs<scalar_t>&, const int64_t*,        \
                                   const int64_t*, cudaStream_t);                               \
  }                                                                                             \
  }

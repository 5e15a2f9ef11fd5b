// Kernels of convolutions that are not depthwise: what goes into the matrix product of
// csrc/dense.h, and what comes back. Shapes: tiles.cuh, columns.h.
#pragma once

#include "tiles.cuh"  // first, since it has headers of torch that must be

#include "columns.h"

namespace dk {
namespace cuda {

// Where channel c of the first cell of the tile's pixel i is; the next cell is C / groups further.
template <typename Args>
DK_INLINE int64_t column_offset(const Args& a, int cells, int64_t i, int c) {
  const int size = static_cast<int>(a.params.channels / a.params.groups), group = c / size;
  return (group * a.count + i) * cells * size + c - group * size;
}

// Where the taps of a block's pixels read, and with which coefficients: in shared memory.
template <typename T, bool kKernel, bool kData>
struct ColumnsTable {
  Vector<T, 4>*kernel_coef, *data_coef, *kernel_sum, *data_sum;
  TapIndex* index;

  DK_INLINE ColumnsTable(unsigned char* memory, int pixels, int taps, bool backward) {
    const ColumnsLayout s = columns_layout<T>(pixels, taps, kKernel, kData, backward);
    kernel_coef = reinterpret_cast<Vector<T, 4>*>(memory + s.kernel_coef);
    data_coef = reinterpret_cast<Vector<T, 4>*>(memory + s.data_coef);
    kernel_sum = reinterpret_cast<Vector<T, 4>*>(memory + s.kernel_sum);
    data_sum = reinterpret_cast<Vector<T, 4>*>(memory + s.data_sum);
    index = reinterpret_cast<TapIndex*>(memory + s.index);
  }

  template <typename Args, typename Sizes>
  __device__ __forceinline__ void fill(const Args& a, const Sizes& size, const PixelTile& tile,
                                       int count) const {
    const ConvParams& p = a.params;
    const int taps = size.taps(), image = static_cast<int>(p.in_h * p.in_w);
    for (int j = threadIdx.x; j < count * taps; j += blockDim.x) {
      const int t = j % taps;
      const Pixel q = tile[j / taps];
      const int64_t n = tile.first_image + q.n;
      TapIndex at{t, -1};
      if constexpr (kData) {
        const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
        at.pixel = q.n * image + sample.h.cell * static_cast<int>(p.in_w) + sample.w.cell;
        data_coef[j] = sample.coef();
      } else {
        at.pixel = rest_pixel(p, size, t, q);
      }
      if constexpr (kKernel) {
        const auto sample = sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w);
        at.cell = sample.h.cell * size.scope_w + sample.w.cell;
        kernel_coef[j] = sample.coef();
      }
      index[j] = at;
    }
  }
};

// ---- columns ------------------------------------------------------------------------------------

// sum[cell ...] += coef * x for the 2x2 cells that begin at `cell`, one of kFirst .. kLast. The
// sums are registers, which have no index at run time: a search, which the threads of a pixel take
// alike.
template <int S, int kFirst, int kLast, typename T, int V>
DK_INLINE void add_to_cells(Vector<T, V> (&sum)[S * S], int cell, const Vector<T, 4>& coef,
                            const Vector<T, V>& x) {
  if constexpr (kFirst == kLast) {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) add_scaled(sum[kFirst + k / 2 * S + k % 2], coef.v[k], x);
  } else {
    constexpr int kMiddle = (kFirst + kLast) / 2;
    if (cell <= kMiddle)
      add_to_cells<S, kFirst, kMiddle>(sum, cell, coef, x);
    else
      add_to_cells<S, kMiddle + 1, kLast>(sum, cell, coef, x);
  }
}

// A block: some pixels, and up to 32 vectors of channels. A thread takes a pixel and a vector, and
// sums up all cells of a scope whose size is known in registers, or one after another.
template <typename scalar_t, int V, int S, bool kKernel, bool kData>
__global__ void __launch_bounds__(kThreads) columns_kernel(const ColumnsArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<0, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const ColumnsTable<T, kKernel, kData> table(memory, a.pixels, taps, /*backward=*/false);

  // The channels of one tile of pixels run next to each other: its offsets stay in cache.
  const int vectors = channels / V, channel_tiles = (vectors + kWarpSize - 1) / kWarpSize;
  const int64_t begin = static_cast<int64_t>(blockIdx.x / channel_tiles) * a.pixels;
  const int count = static_cast<int>(a.count - begin < a.pixels ? a.count - begin : a.pixels);
  const PixelTile tile(a.first + begin, p.batch, p.out_h, p.out_w);
  table.fill(a, size, tile, count);
  __syncthreads();

  const int first = static_cast<int>(blockIdx.x % channel_tiles) * kWarpSize;
  const int width = vectors - first < kWarpSize ? vectors - first : kWarpSize;
  const int step = channels / static_cast<int>(p.groups);  // from cell to cell
  const Steps pixel_steps(p.in_h, p.in_w, channels), cell_steps(size.scope_h, size.scope_w, 1);
  for (int j = threadIdx.x; j < count * width; j += blockDim.x) {
    const int i = j / width, c = (first + j % width) * V;
    const scalar_t* input = a.input + tile.first_image * p.in_h * p.in_w * channels + c;
    scalar_t* to = a.columns + column_offset(a, cells, begin + i, c);
    const auto value = [&](int pair) {
      const int pixel = table.index[pair].pixel;
      Vector<T, V> x{};
      if (!kData && pixel < 0) return x;
      const scalar_t* from = input + static_cast<int64_t>(pixel) * channels;
      if constexpr (!kData) return load<V>(from);
      const Vector<T, 4> coef = table.data_coef[pair];
      DK_UNROLL
      for (int k = 0; k < 4; ++k) add_scaled(x, coef.v[k], load<V>(from + pixel_steps[k]));
      return x;
    };
    if constexpr (!kKernel) {
      for (int t = 0; t < taps; ++t) store<V>(to + t * step, value(i * taps + t));
    } else if constexpr (S > 0) {
      Vector<T, V> sum[S * S] = {};
      for (int pair = i * taps; pair < (i + 1) * taps; ++pair) {
        constexpr int kLast = (S - 2) * S + S - 2;
        add_to_cells<S, 0, kLast>(sum, table.index[pair].cell, table.kernel_coef[pair],
                                  value(pair));
      }
      DK_UNROLL
      for (int cell = 0; cell < S * S; ++cell) store<V>(to + cell * step, sum[cell]);
    } else {
      for (int cell = 0; cell < cells; ++cell) {
        Vector<T, V> sum{};
        for (int pair = i * taps; pair < (i + 1) * taps; ++pair) {
          DK_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (table.index[pair].cell + cell_steps[k] == cell)
              add_scaled(sum, table.kernel_coef[pair].v[k], value(pair));
          }
        }
        store<V>(to + cell * step, sum);
      }
    }
  }
}

// ---- offsets, and what the taps read ------------------------------------------------------------

// A block: some pixels, all of their channels; so a sum over channels is the whole one, which can
// be turned inward at once. `lanes` threads of a warp take a pixel, each a vector of channels.
template <typename scalar_t, int V, bool kKernel, bool kData>
__global__ void __launch_bounds__(kThreads)
    columns_backward_kernel(const ColumnsBackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int taps = size.taps(), channels = static_cast<int>(p.channels);
  const ColumnsTable<T, kKernel, kData> table(memory, a.pixels, taps, /*backward=*/true);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.pixels;
  const int count = static_cast<int>(a.count - begin < a.pixels ? a.count - begin : a.pixels);
  const PixelTile tile(a.first + begin, p.batch, p.out_h, p.out_w);
  table.fill(a, size, tile, count);
  __syncthreads();

  const int lane = threadIdx.x % a.lanes, step = channels / static_cast<int>(p.groups);
  const Steps cell_steps(size.scope_h, size.scope_w, step), pixel_steps(p.in_h, p.in_w, channels);
  for (int first = 0; first < count; first += blockDim.x / a.lanes) {
    const int i = first + threadIdx.x / a.lanes;
    for (int t = 0; t < taps; ++t) {
      const int pair = i * taps + t;
      Vector<T, 4> kernel_sum{}, data_sum{};
      // All threads of the warp meet below, whether there is a pixel for them or not.
      if (i < count && (kData || table.index[pair].pixel >= 0)) {
        const TapIndex at = table.index[pair];
        const Vector<T, 4> kernel_coef = kKernel ? table.kernel_coef[pair] : Vector<T, 4>{};
        const Vector<T, 4> data_coef = kData ? table.data_coef[pair] : Vector<T, 4>{};
        const scalar_t* input =
            a.input + (tile.first_image * p.in_h * p.in_w + at.pixel) * channels;
        for (int c = lane * V; c < channels; c += a.lanes * V) {
          const scalar_t* grad = a.grad_columns + column_offset(a, size.cells(), begin + i, c) +
                                 static_cast<int64_t>(at.cell) * step;
          Vector<T, V> x{}, grad_tap{}, pixels[4];
          if constexpr (kData) {
            DK_UNROLL
            for (int k = 0; k < 4; ++k) {
              pixels[k] = load<V>(input + pixel_steps[k] + c);
              add_scaled(x, data_coef.v[k], pixels[k]);
            }
          } else {
            x = load<V>(input + c);
          }
          if constexpr (kKernel) {
            DK_UNROLL
            for (int k = 0; k < 4; ++k) {
              const Vector<T, V> g = load<V>(grad + cell_steps[k]);
              add_scaled(grad_tap, kernel_coef.v[k], g);
              kernel_sum.v[k] += dot(x, g);
            }
          } else {
            grad_tap = load<V>(grad);
          }
          if constexpr (kData) {
            DK_UNROLL
            for (int k = 0; k < 4; ++k) data_sum.v[k] += dot(grad_tap, pixels[k]);
          }
          store<V>(a.grad_taps + ((begin + i) * taps + t) * channels + c, grad_tap);
        }
      }
      const bool writes = i < count && lane < 4;
      if constexpr (kKernel) {
        const T sum = fold_sum(kernel_sum.v, a.lanes);
        if (writes) table.kernel_sum[pair].v[lane] = sum;
      }
      if constexpr (kData) {
        const T sum = fold_sum(data_sum.v, a.lanes);
        if (writes) table.data_sum[pair].v[lane] = sum;
      }
    }
  }
  __syncthreads();

  for (int j = threadIdx.x; j < count * taps; j += blockDim.x) {
    if (!kData && table.index[j].pixel < 0) continue;
    const int t = j % taps;
    const Pixel q = tile[j / taps];
    const int64_t n = tile.first_image + q.n;
    if constexpr (kKernel) {
      const Vector<T, 4> sum = table.kernel_sum[j];
      const auto weight = sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w);
      T h = weight.grad_h(sum), w = weight.grad_w(sum);
      if (p.clip) {
        const auto location = locate_in_scope(size, a.kernel_offset, n, t, q.h, q.w);
        h = inward(location.h, size.scope_h, h);
        w = inward(location.w, size.scope_w, w);
      }
      T* to = offset_of(a.grad_kernel_offset, n, t, q.h, q.w);
      to[0] = h;
      to[a.grad_kernel_offset.strides.c] = w;
      if (a.kernel_offset.modulated) {
        *factor_of(a.grad_kernel_offset, taps, n, t, q.h, q.w) = weight.grad_factor(sum);
      }
    }
    if constexpr (kData) {
      const Vector<T, 4> sum = table.data_sum[j];
      const auto data = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
      T* to = offset_of(a.grad_data_offset, n, t, q.h, q.w);
      to[0] = data.grad_h(sum);
      to[a.grad_data_offset.strides.c] = data.grad_w(sum);
      if (a.data_offset.modulated) {
        *factor_of(a.grad_data_offset, taps, n, t, q.h, q.w) = data.grad_factor(sum);
      }
    }
  }
}

// ---- input --------------------------------------------------------------------------------------

// One thread per input pixel and vector of channels, which adds up the taps that read it.
template <typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads)
    add_taps_kernel(const ColumnsBackwardArgs<scalar_t> a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels), vectors = channels / V;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t pixel = begin * p.in_w + element / vectors;
  if (pixel >= end * p.in_w) return;
  const int c = static_cast<int>(element % vectors) * V;
  const int64_t line = pixel / p.in_w, n = line / p.in_h;
  const int y = static_cast<int>(line % p.in_h), x = static_cast<int>(pixel % p.in_w);
  T* to = a.grad_input + pixel * channels + c;
  Vector<T, V> sum = load<V>(to);
  for (int tap_h = 0; tap_h < size.kernel_h; ++tap_h) {
    const int row = fed_output(y, p.pad_h, tap_h, p.dilation_h, p.stride_h, p.out_h);
    if (row < 0) continue;
    for (int tap_w = 0; tap_w < size.kernel_w; ++tap_w) {
      const int column = fed_output(x, p.pad_w, tap_w, p.dilation_w, p.stride_w, p.out_w);
      const int64_t i = (n * p.out_h + row) * p.out_w + column - a.first;
      if (column < 0 || i < 0 || i >= a.count) continue;
      const int t = tap_h * size.kernel_w + tap_w;
      add_scaled(sum, T(1), load<V>(a.grad_taps + (i * size.taps() + t) * channels + c));
    }
  }
  store<V>(to, sum);
}

// One thread per tap of an output pixel and vector of channels.
template <typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads)
    scatter_taps_kernel(const ColumnsBackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels);
  const int64_t element = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (element >= a.count * size.taps() * channels) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, a.first * size.taps() + element / channels, &n, &t);
  const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
  const Vector<T, 4> coef = sample.coef();
  const Steps steps(p.in_h, p.in_w, channels);
  T* to = a.grad_input + ((n * p.in_h + sample.h.cell) * p.in_w + sample.w.cell) * channels +
          element % channels;
  const Vector<T, V> grad = load<V>(a.grad_taps + element);
  DK_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (coef.v[k] != T(0)) atomic_add(to + steps[k], scaled(coef.v[k], grad));
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

// Calls f(Int<V>) with the channels that a thread takes.
template <typename T, typename F>
void dispatch_vector(const ConvParams& p, const F& f) {
  if (p.channels / p.groups % kColumnsVector<T> == 0)
    f(Int<kColumnsVector<T>>());
  else
    f(Int<1>());
}

// Calls f(Int<S>) with the scopes that have kernels of their own, else with 0.
template <bool kKernel, typename F>
void dispatch_scope(const ConvParams& p, const F& f) {
  if constexpr (kKernel) {
    const int64_t size = p.scope_h == p.scope_w ? p.scope_h : 0;
    if (size == 2) return f(Int<2>());
    if (size == 3) return f(Int<3>());
    if (size == 4) return f(Int<4>());
    if (size == 5) return f(Int<5>());
  }
  f(Int<0>());
}

template <typename scalar_t>
void launch_columns(const ColumnsArgs<scalar_t>& a, cudaStream_t stream) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t tiles = (a.count + a.pixels - 1) / a.pixels;
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    const size_t bytes =
        columns_layout<T>(a.pixels, p.taps(), kKernel, kData, /*backward=*/false).bytes;
    dispatch_scope<kKernel>(p, [&](auto s) {
      dispatch_vector<T>(p, [&](auto v) {
        constexpr int V = decltype(v)::value;
        const int64_t vectors = p.channels / V;
        launch(columns_kernel<scalar_t, V, decltype(s)::value, kKernel, kData>,
               tiles * ((vectors + kWarpSize - 1) / kWarpSize), kThreads, bytes, stream, a);
      });
    });
  });
}

template <typename scalar_t>
void launch_columns_backward(ColumnsBackwardArgs<scalar_t> a, cudaStream_t stream) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    const size_t bytes =
        columns_layout<T>(a.pixels, p.taps(), kKernel, kData, /*backward=*/true).bytes;
    dispatch_vector<T>(p, [&](auto v) {
      constexpr int V = decltype(v)::value;
      a.lanes = 4;  // of fold_sum, at least
      while (a.lanes < kWarpSize && a.lanes * V < p.channels) a.lanes *= 2;
      launch(columns_backward_kernel<scalar_t, V, kKernel, kData>,
             (a.count + a.pixels - 1) / a.pixels, kThreads, bytes, stream, a);
    });
  });
}

template <typename scalar_t>
void launch_add_taps(const ColumnsBackwardArgs<scalar_t>& a, int64_t begin, int64_t end,
                     cudaStream_t stream) {
  const ConvParams& p = a.params;
  dispatch_vector<opmath_t<scalar_t>>(p, [&](auto v) {
    constexpr int V = decltype(v)::value;
    launch(add_taps_kernel<scalar_t, V>, blocks_of((end - begin) * p.in_w * (p.channels / V)),
           kThreads, 0, stream, a, begin, end);
  });
}

template <typename scalar_t>
void launch_scatter_taps(const ColumnsBackwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  dispatch_vector<opmath_t<scalar_t>>(p, [&](auto v) {
    constexpr int V = decltype(v)::value;
    launch(scatter_taps_kernel<scalar_t, V>, blocks_of(a.count * p.taps() * (p.channels / V)),
           kThreads, 0, stream, a);
  });
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
  template void launch_columns_backward(ColumnsBackwardArgs<scalar_t>, cudaStream_t);           \
  template void launch_add_taps(const ColumnsBackwardArgs<scalar_t>&, int64_t, int64_t,         \
                                cudaStream_t);                                                  \
  template void launch_scatter_taps(const ColumnsBackwardArgs<scalar_t>&, cudaStream_t);        \
  template void launch_tap_bases(const ColumnsBackwardArgs<scalar_t>&, int64_t*, cudaStream_t); \
  template void launch_gather_taps(const ColumnsBackwardArgs<scalar_t>&, const int64_t*,        \
                                   const int64_t*, cudaStream_t);                               \
  }                                                                                             \
  }

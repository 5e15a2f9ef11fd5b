// Backward kernels. Shapes: tiles.cuh.
//
// Sums over channels (the offsets' gradients) are folded within a pixel's threads, then added up
// over the channel tiles of a block in order, and over the groups of tiles by the host function;
// only the complete sum is turned inward, by turn_inward_kernel. Sums over pixels (the weight's
// gradient) are kept by each thread for its own channels in its own part of shared memory, added up
// once per block in order, and over the blocks by sum_weight_kernel. So nothing but the scatter of
// a data_offset needs atomics, and everything else comes out the same every time.
#pragma once

#include "tiles.cuh"

namespace dk {
namespace cuda {

// ---- a block's share of the work ----------------------------------------------------------------

// Pixel tiles [first, last) of a split and channel tiles [first_channels, last_channels) of a
// group.
struct Share {
  int split, group, first_channels, last_channels;
  int64_t first, last;

  DK_INLINE Share(int block, int splits, int groups, int channel_tiles, int64_t tiles) {
    split = block / groups;
    group = block % groups;
    first_channels = static_cast<int>(int64_t(group) * channel_tiles / groups);
    last_channels = static_cast<int>(int64_t(group + 1) * channel_tiles / groups);
    first = split * tiles / splits;
    last = (split + 1) * tiles / splits;
  }
};

// A thread's sums over pixels, [cells, row]: those of its warp, its own column.
template <int V, typename T>
__device__ __forceinline__ T* sums_of(int thread, T* weight_sum, int cells) {
  return weight_sum + thread / kWarpSize * cells * kRow<V> + thread % kWarpSize * V;
}

template <int V, typename T>
__device__ __forceinline__ void clear_sums(T* sums, int cells) {
  for (int cell = 0; cell < cells; ++cell) store<V>(sums + cell * kRow<V>, Vector<T, V>{});
}

template <int V, typename T>
__device__ __forceinline__ void add_to_sum(T* sum, T factor, const Vector<T, V>& x) {
  Vector<T, V> s = load<V>(sum);
  add_scaled(s, factor, x);
  store<V>(sum, s);
}

// Adds up the threads' sums of the channel tile that begins at `begin` into the block's partial
// gradient.
template <int V, typename scalar_t>
__device__ __forceinline__ void store_weight_partial(const BackwardArgs<scalar_t>& a, int split,
                                                     opmath_t<scalar_t>* weight_sum, int cells,
                                                     int begin) {
  using T = opmath_t<scalar_t>;
  const int threads = static_cast<int>(blockDim.x), lanes = a.channels.lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, c = begin + lane * V;
  if (c >= a.params.channels) return;
  for (int cell = threadIdx.x / lanes; cell < cells; cell += threads / lanes) {
    Vector<T, V> sum{};
    for (int thread = lane; thread < threads; thread += lanes) {
      add_scaled(sum, T(1), load<V>(sums_of<V>(thread, weight_sum, cells) + cell * kRow<V>));
    }
    store<V>(a.weight_partial + (int64_t(split) * cells + cell) * a.params.channels + c, sum);
  }
}

template <typename T>
__device__ __forceinline__ void add_offset_gradient(const Offset<T>& offset, int taps, int64_t n,
                                                    int t, int h, int w, const TapSample<T>& sample,
                                                    const Vector<T, 4>& grad_coef) {
  T* at = offset_of(offset, n, t, h, w);
  at[0] += sample.grad_h(grad_coef);
  at[offset.strides.c] += sample.grad_w(grad_coef);
  if (offset.modulated) *factor_of(offset, taps, n, t, h, w) += sample.grad_factor(grad_coef);
}

template <typename scalar_t>
__device__ __forceinline__ Offset<opmath_t<scalar_t>> of_group(const BackwardArgs<scalar_t>& a,
                                                               Offset<opmath_t<scalar_t>> offset,
                                                               int group) {
  const ConvParams& p = a.params;
  const int64_t channels = (offset.modulated ? 3 : 2) * p.kernel_h * p.kernel_w;
  offset.data += group * channels * p.batch * p.out_h * p.out_w;
  return offset;
}

// ---- rigid data grid ----------------------------------------------------------------------------
//
// By input pixels: pixel q and tap t meet in the one output p = (q + pad - k_t * dilation) /
// stride, if that is on the stride grid. Every pair (p, t) is visited once, by one block: its
// coefficients are computed, and its offset's gradient is written, there and nowhere else. Pairs in
// the padding are not visited, so their gradient must be zero beforehand.

// The output pixel that input pixel q feeds through tap t; h < 0: none.
template <typename Sizes>
DK_INLINE Pixel fed_pixel(const ConvParams& p, const Sizes& size, const Pixel& q, int t) {
  const int h = fed_output(q.h, p.pad_h, t / size.kernel_w, p.dilation_h, p.stride_h, p.out_h);
  const int w = fed_output(q.w, p.pad_w, t % size.kernel_w, p.dilation_w, p.stride_w, p.out_w);
  return {q.n, w < 0 ? -1 : h, w};
}

// The sums over a pixel's threads take the place of its coefficients, which all of them have read:
// of two neighbouring pixels, four each.
template <typename T>
__device__ __forceinline__ void store_grad_coef(Vector<T, 4>* coef, T (&grad)[8], int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const T sum = fold_sum<8>(grad, lanes);
  __syncwarp();
  if (lane < 8) coef[lane / 4].v[lane % 4] = sum;
}

template <typename scalar_t, int V, int K, int S, bool kKernel>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const BackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const int lanes = a.channels.lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const Shared<scalar_t, V, kKernel, false> shared(memory, taps, cells, a.warps);
  T* sums = sums_of<V>(threadIdx.x, shared.weight_sum, cells);
  const scalar_t* weight = shared.weight + lane * V;
  const Steps cell_steps(size.scope_h, size.scope_w, kRow<V>);
  const int out_w = static_cast<int>(p.out_w), out_h = static_cast<int>(p.out_h);
  const Share share(blockIdx.x, a.splits, a.groups, a.channels.tiles,
                    pixel_tiles(p.batch * p.in_h * p.in_w));
  const Offset<T> grad_kernel_offset = of_group(a, a.grad_kernel_offset, share.group);

  for (int channel_tile = share.first_channels; channel_tile < share.last_channels;
       ++channel_tile) {
    const int begin = channel_tile * lanes * V, c = begin + lane * V;
    shared.stage_weight(size, a.weight, begin, lanes * V, channels);
    clear_sums<V>(sums, cells);
    for (int64_t tile_index = share.first; tile_index < share.last; ++tile_index) {
      const int64_t first = tile_index * kPixels;
      const PixelTile tile(first, p.batch, p.in_h, p.in_w);
      for (int j = threadIdx.x; j < taps * kPixels; j += blockDim.x) {
        const int t = j / kPixels, i = j % kPixels;
        TapIndex at{t * kRow<V>, -1};
        const Pixel out = i < tile.count ? fed_pixel(p, size, tile[i], t) : Pixel{0, -1, -1};
        if (out.h >= 0) {
          at.pixel = (out.n * out_h + out.h) * out_w + out.w;
          if constexpr (kKernel) {
            const auto sample =
                sample_weight(p, size, a.kernel_offset, tile.first_image + out.n, t, out.h, out.w);
            at.cell = (sample.h.cell * size.scope_w + sample.w.cell) * kRow<V>;
            shared.kernel_coef[j] = sample.coef();
          }
        }
        shared.index[j] = at;
      }
      __syncthreads();

      const auto is_own = [&](int i) { return i < tile.count && c < channels; };
      const Pixels<scalar_t> grad_output(
          a.grad_output + tile.first_image * out_h * out_w * channels + c, channels);
      const int groups = static_cast<int>(blockDim.x) / lanes;
      for (int i0 = threadIdx.x / lanes * kHeldPixels; i0 < kPixels; i0 += groups * kHeldPixels) {
        Vector<T, V> x[kHeldPixels] = {}, grad_x[kHeldPixels] = {};
        DK_UNROLL
        for (int i = 0; i < kHeldPixels; ++i) {
          if (is_own(i0 + i)) x[i] = load<V>(a.input + (first + i0 + i) * channels + c);
        }
        HeldCells<T, V, kKernel> cell;
        Vector<T, V> sum[cell.count] = {};  // of those cells
        for (int t = 0; t < taps; ++t) {
          // Σ over channels of grad_output * x * the cell's weight, of two pixels
          T grad_coef[8];
          DK_UNROLL
          for (int i = 0; i < kHeldPixels; ++i) {
            const int j = t * kPixels + i0 + i, pair = i % 2 * 4;
            DK_UNROLL
            for (int k = 0; k < 4; ++k) grad_coef[pair + k] = T(0);
            const TapIndex at = shared.index[j];
            if (c < channels && at.pixel >= 0) {
              if (at.cell != cell.at) {
                cell.add_to(sums, cell_steps, sum);
                cell.hold(at.cell, weight, cell_steps);
              }
              const auto g = load<V>(grad_output[at.pixel]);
              const auto gx = product(g, x[i]);
              Vector<T, V> w{};
              if constexpr (kKernel) {
                const Vector<T, 4> coef = shared.kernel_coef[j];
                DK_UNROLL
                for (int k = 0; k < 4; ++k) {
                  add_scaled(w, coef.v[k], cell.v[k]);
                  grad_coef[pair + k] = dot(gx, cell.v[k]);
                  add_scaled(sum[k], coef.v[k], gx);
                }
              } else {
                w = cell.v[0];
                add_scaled(sum[0], T(1), gx);
              }
              DK_UNROLL
              for (int v = 0; v < V; ++v) grad_x[i].v[v] += g.v[v] * w.v[v];
            }
            if (kKernel && i % 2) store_grad_coef(shared.kernel_coef + j - 1, grad_coef, lanes);
          }
        }
        cell.add_to(sums, cell_steps, sum);
        DK_UNROLL
        for (int i = 0; i < kHeldPixels; ++i) {
          if (is_own(i0 + i)) store<V>(a.grad_input + (first + i0 + i) * channels + c, grad_x[i]);
        }
      }
      __syncthreads();

      if constexpr (kKernel) {
        for (int j = threadIdx.x; j < taps * kPixels; j += blockDim.x) {
          if (shared.index[j].pixel < 0) continue;
          const int t = j / kPixels;
          const Pixel out = fed_pixel(p, size, tile[j % kPixels], t);
          const int64_t n = tile.first_image + out.n;
          const auto sample = sample_weight(p, size, a.kernel_offset, n, t, out.h, out.w);
          add_offset_gradient(grad_kernel_offset, taps, n, t, out.h, out.w, sample,
                              shared.kernel_coef[j]);
        }
        // The same thread fills the same pairs of the next tile: no barrier.
      }
    }
    // A split has at least one tile, whose last barrier comes after all sums.
    store_weight_partial<V>(a, share.split, shared.weight_sum, cells, begin);
    __syncthreads();
  }
}

// ---- deformed data grid -------------------------------------------------------------------------

// By output pixels: the gradients of offsets and weight; the input's, if wanted, by atomics.
template <typename scalar_t, int V, int K, int S, bool kKernel>
__global__ void __launch_bounds__(kThreads, 2)
    backward_data_kernel(const BackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const int lanes = a.channels.lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const Shared<scalar_t, V, kKernel, true> shared(memory, taps, cells, a.warps);
  T* sums = sums_of<V>(threadIdx.x, shared.weight_sum, cells);
  const scalar_t* weight = shared.weight + lane * V;
  const Steps cell_steps(size.scope_h, size.scope_w, kRow<V>),
      pixel_steps(p.in_h, p.in_w, channels);
  const Share share(blockIdx.x, a.splits, a.groups, a.channels.tiles,
                    pixel_tiles(p.batch * p.out_h * p.out_w));
  const Offset<T> grad_kernel_offset = of_group(a, a.grad_kernel_offset, share.group);
  const Offset<T> grad_data_offset = of_group(a, a.grad_data_offset, share.group);

  for (int channel_tile = share.first_channels; channel_tile < share.last_channels;
       ++channel_tile) {
    const int begin = channel_tile * lanes * V, c = begin + lane * V;
    shared.stage_weight(size, a.weight, begin, lanes * V, channels);
    clear_sums<V>(sums, cells);
    for (int64_t tile_index = share.first; tile_index < share.last; ++tile_index) {
      const int64_t first = tile_index * kPixels;
      const PixelTile tile(first, p.batch, p.out_h, p.out_w);
      shared.fill_output_taps(p, size, tile, a.kernel_offset, a.data_offset);
      __syncthreads();

      const int64_t image = tile.first_image * p.in_h * p.in_w * channels + c;
      for (int i = threadIdx.x / lanes; i < kPixels; i += blockDim.x / lanes) {
        const bool active = i < tile.count && c < channels;
        Vector<T, V> g{};
        if (active) g = load<V>(a.grad_output + (first + i) * channels + c);
        for (int t = 0; t < taps; ++t) {
          const int j = t * kPixels + i;
          // Σ over channels of what each coefficient is multiplied with: the data's, the kernel's.
          T grad_coef[kKernel ? 8 : 4] = {};
          if (active) {
            const TapIndex at = shared.index[j];
            const Vector<T, 4> data_coef = shared.data_coef[j];
            const int64_t from = image + static_cast<int64_t>(at.pixel) * channels;
            Vector<T, V> x[4], value{};
            DK_UNROLL
            for (int k = 0; k < 4; ++k) {
              x[k] = load<V>(a.input + from + pixel_steps[k]);
              add_scaled(value, data_coef.v[k], x[k]);
            }
            const auto gx = product(g, value);
            Vector<T, V> w{};
            if constexpr (kKernel) {
              const Vector<T, 4> coef = shared.kernel_coef[j];
              DK_UNROLL
              for (int k = 0; k < 4; ++k) {
                const auto cell_weight = load<V>(weight + at.cell + cell_steps[k]);
                add_scaled(w, coef.v[k], cell_weight);
                grad_coef[4 + k] = dot(gx, cell_weight);
                add_to_sum<V>(sums + at.cell + cell_steps[k], coef.v[k], gx);
              }
            } else {
              w = load<V>(weight + at.cell);
              add_to_sum<V>(sums + at.cell, T(1), gx);
            }
            const auto gw = product(g, w);
            DK_UNROLL
            for (int k = 0; k < 4; ++k) {
              grad_coef[k] = dot(gw, x[k]);
              if (!a.grad_input_sum || data_coef.v[k] == T(0)) continue;
              atomic_add(a.grad_input_sum + from + pixel_steps[k], scaled(data_coef.v[k], gw));
            }
          }
          // All threads of the pixel have read its coefficients: their gradient takes the place.
          const T sum = fold_sum<kKernel ? 8 : 4>(grad_coef, lanes);
          __syncwarp();
          if (lane < 4) shared.data_coef[j].v[lane] = sum;
          if (kKernel && lane >= 4 && lane < 8) shared.kernel_coef[j].v[lane - 4] = sum;
        }
      }
      __syncthreads();

      for (int j = threadIdx.x; j < taps * kPixels; j += blockDim.x) {
        const int t = j / kPixels, i = j % kPixels;
        if (i >= tile.count) continue;
        const Pixel q = tile[i];
        const int64_t n = tile.first_image + q.n;
        add_offset_gradient(grad_data_offset, taps, n, t, q.h, q.w,
                            sample_data(p, size, a.data_offset, n, t, q.h, q.w),
                            shared.data_coef[j]);
        if constexpr (kKernel) {
          add_offset_gradient(grad_kernel_offset, taps, n, t, q.h, q.w,
                              sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w),
                              shared.kernel_coef[j]);
        }
      }
      // The same thread fills the same pairs of the next tile: no barrier.
    }
    // A split has at least one tile, whose last barrier comes after all sums.
    store_weight_partial<V>(a, share.split, shared.weight_sum, cells, begin);
    __syncthreads();
  }
}

template <typename scalar_t>
__global__ void base_pixels_kernel(const BackwardArgs<scalar_t> a, int64_t* base) {
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= p.batch * p.out_h * p.out_w * size.taps()) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, pair, &n, &t);
  const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
  base[pair] = (n * p.in_h + sample.h.cell) * p.in_w + sample.w.cell;
}

// By input pixels, one warp each, a thread per channel: adds, in sorted order, what the pairs send
// here whose 2x2 block begins at this pixel, left of it, above it, and above left of it.
template <typename scalar_t, bool kKernel>
__global__ void __launch_bounds__(kThreads)
    gather_grad_input_kernel(const BackwardArgs<scalar_t> a, const int64_t* sorted_base,
                             const int64_t* pair, scalar_t* grad_input) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels);
  const int channel_tiles = (channels + kWarpSize - 1) / kWarpSize;
  const int c = static_cast<int>(blockIdx.x % channel_tiles) * kWarpSize + threadIdx.x % kWarpSize;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x / channel_tiles) * (kThreads / kWarpSize) +
                        threadIdx.x / kWarpSize;
  if (pixel >= p.batch * p.in_h * p.in_w || c >= channels) return;
  const int64_t pairs = p.batch * p.out_h * p.out_w * size.taps();
  const int x = static_cast<int>(pixel % p.in_w), y = static_cast<int>(pixel / p.in_w % p.in_h);
  const scalar_t* weight = a.weight + static_cast<int64_t>(c) * size.cells();
  const Steps cell_steps(size.scope_h, size.scope_w, 1);
  T sum = T(0);
  DK_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (y < k / 2 || x < k % 2) continue;
    const int64_t base = pixel - k / 2 * p.in_w - k % 2;
    for (int64_t e = lower_bound(sorted_base, pairs, base); e < pairs && sorted_base[e] == base;
         ++e) {
      int64_t n;
      int t;
      const Pixel q = pixel_of_pair(p, size, pair[e], &n, &t);
      const T coef = sample_data(p, size, a.data_offset, n, t, q.h, q.w).coef().v[k];
      if (coef == T(0)) continue;
      T w;
      if constexpr (kKernel) {
        const auto sample = sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w);
        const scalar_t* cell = weight + sample.h.cell * size.scope_w + sample.w.cell;
        const auto scope_coef = sample.coef();
        w = T(0);
        for (int j = 0; j < 4; ++j) w += scope_coef.v[j] * static_cast<T>(cell[cell_steps[j]]);
      } else {
        w = static_cast<T>(weight[t]);
      }
      const int64_t output = (n * p.out_h + q.h) * p.out_w + q.w;
      sum += coef * (static_cast<T>(a.grad_output[output * channels + c]) * w);
    }
  }
  grad_input[pixel * channels + c] = static_cast<scalar_t>(sum);
}

// ---- kernel offsets -----------------------------------------------------------------------------

// One thread per output pixel and tap.
template <typename scalar_t>
__global__ void turn_inward_kernel(const BackwardArgs<scalar_t> a,
                                   const Offset<opmath_t<scalar_t>> grad) {
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= p.batch * p.out_h * p.out_w * size.taps()) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, pair, &n, &t);
  const auto location = locate_in_scope(size, a.kernel_offset, n, t, q.h, q.w);
  auto* at = offset_of(grad, n, t, q.h, q.w);
  at[0] = inward(location.h, size.scope_h, at[0]);
  at[grad.strides.c] = inward(location.w, size.scope_w, at[grad.strides.c]);
}

// ---- weight -------------------------------------------------------------------------------------

constexpr int kSumRows = 8;

// Sums the splits: kWarpSize channels of one cell per block, kSumRows interleaved partial sums.
template <typename scalar_t>
__global__ void sum_weight_kernel(const BackwardArgs<scalar_t> a, scalar_t* grad_weight) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  T* partial = reinterpret_cast<T*>(memory);  // [kSumRows, kWarpSize]
  const Sizes<0, 0> size(a.params);
  const int cells = size.cells(), channels = static_cast<int>(a.params.channels);
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize;
  const int cell = static_cast<int>(blockIdx.x % cells);
  const int c = static_cast<int>(blockIdx.x / cells) * kWarpSize + lane;
  T sum = T(0);
  if (c < channels) {
    for (int split = row; split < a.splits; split += kSumRows) {
      sum += a.weight_partial[(static_cast<int64_t>(split) * cells + cell) * channels + c];
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || c >= channels) return;
  for (int r = 1; r < kSumRows; ++r) sum += partial[r * kWarpSize + lane];
  grad_weight[static_cast<int64_t>(c) * cells + cell] = static_cast<scalar_t>(sum);
}

// ---- launches -----------------------------------------------------------------------------------

template <typename scalar_t>
void launch_backward(const BackwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    const size_t bytes =
        shared_layout<scalar_t>(a.channels.vector, p.taps(), p.cells(), a.warps, kKernel, kData)
            .bytes;
    const auto run = [&](auto vector, auto k, auto s) {
      constexpr int V = decltype(vector)::value, K = decltype(k)::value, S = decltype(s)::value;
      void (*function)(BackwardArgs<scalar_t>);
      if constexpr (kData)
        function = backward_data_kernel<scalar_t, V, K, S, kKernel>;
      else
        function = backward_kernel<scalar_t, V, K, S, kKernel>;
      launch(function, static_cast<int64_t>(a.splits) * a.groups, a.warps * kWarpSize, bytes,
             stream, a);
    };
    if (a.channels.vector == 1) return run(Int<1>(), Int<0>(), Int<0>());
    dispatch_sizes<kKernel>(
        p, [&](auto k, auto s) { run(Int<16 / sizeof(opmath_t<scalar_t>)>(), k, s); });
  });
}

// Runs `kernel` with a thread for every output pixel and tap.
template <typename scalar_t, typename... Params>
void launch_pairs(void (*kernel)(BackwardArgs<scalar_t>, Params...),
                  const BackwardArgs<scalar_t>& a, cudaStream_t stream,
                  const std::common_type_t<Params>&... args) {
  const ConvParams& p = a.params;
  const int64_t pairs = p.batch * p.out_h * p.out_w * p.taps();
  launch(kernel, (pairs + kThreads - 1) / kThreads, kThreads, 0, stream, a, args...);
}

template <typename scalar_t>
void launch_turn_inward(const BackwardArgs<scalar_t>& a, const Offset<opmath_t<scalar_t>>& grad,
                        cudaStream_t stream) {
  launch_pairs(turn_inward_kernel<scalar_t>, a, stream, grad);
}

template <typename scalar_t>
void launch_sum_weight(const BackwardArgs<scalar_t>& a, scalar_t* grad_weight,
                       cudaStream_t stream) {
  const int64_t blocks = (a.params.channels + kWarpSize - 1) / kWarpSize * a.params.cells();
  launch(sum_weight_kernel<scalar_t>, blocks, kSumRows * kWarpSize,
         sizeof(opmath_t<scalar_t>) * kSumRows * kWarpSize, stream, a, grad_weight);
}

template <typename scalar_t>
void launch_base_pixels(const BackwardArgs<scalar_t>& a, int64_t* base, cudaStream_t stream) {
  launch_pairs(base_pixels_kernel<scalar_t>, a, stream, base);
}

template <typename scalar_t>
void launch_gather_grad_input(const BackwardArgs<scalar_t>& a, const int64_t* sorted_base,
                              const int64_t* pair, scalar_t* grad_input, cudaStream_t stream) {
  const ConvParams& p = a.params;
  constexpr int pixels = kThreads / kWarpSize;
  const int64_t blocks = (p.batch * p.in_h * p.in_w + pixels - 1) / pixels *
                         ((p.channels + kWarpSize - 1) / kWarpSize);
  if (a.kernel_offset.data) {
    launch(gather_grad_input_kernel<scalar_t, true>, blocks, kThreads, 0, stream, a, sorted_base,
           pair, grad_input);
  } else {
    launch(gather_grad_input_kernel<scalar_t, false>, blocks, kThreads, 0, stream, a, sorted_base,
           pair, grad_input);
  }
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_BACKWARD(scalar_t)                                                  \
  namespace dk {                                                                           \
  namespace cuda {                                                                         \
  template void launch_backward(const BackwardArgs<scalar_t>&, cudaStream_t);              \
  template void launch_turn_inward(const BackwardArgs<scalar_t>&,                          \
                                   const Offset<opmath_t<scalar_t>>&, cudaStream_t);       \
  template void launch_sum_weight(const BackwardArgs<scalar_t>&, scalar_t*, cudaStream_t); \
  template void launch_base_pixels(const BackwardArgs<scalar_t>&, int64_t*, cudaStream_t); \
  template void launch_gather_grad_input(const BackwardArgs<scalar_t>&, const int64_t*,    \
                                         const int64_t*, scalar_t*, cudaStream_t);         \
  }                                                                                        \
  }

// Forward kernels. Shapes: tiles.cuh.
#pragma once

#include "tiles.cuh"

namespace dk {
namespace cuda {

// ---- channels_last ------------------------------------------------------------------------------

template <typename scalar_t, int V, int K, int S, bool kKernel, bool kData>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const Shared<scalar_t, V, kKernel, kData> shared(memory, taps, cells, 0);

  // The tiles of channels of one tile of pixels run next to each other: its offsets stay in cache.
  const int width = a.channels.lanes * V;
  const int begin = static_cast<int>(blockIdx.x % a.channels.tiles) * width;
  const int64_t first = static_cast<int64_t>(blockIdx.x / a.channels.tiles) * kPixels;
  const PixelTile tile(first, p.batch, p.out_h, p.out_w);
  shared.stage_weight(size, a.weight, begin, width, channels);
  shared.fill_output_taps(p, size, tile, a.kernel_offset, a.data_offset);
  __syncthreads();

  const PixelThread thread(a.channels);
  const int c = begin + thread.lane * V;
  if (c >= channels) return;
  const Pixels<const scalar_t> input(a.input + tile.first_image * p.in_h * p.in_w * channels + c,
                                     channels);
  const scalar_t* weight = shared.weight + thread.lane * V;
  const Steps cell_steps(size.scope_h, size.scope_w, kRow<V>),
      pixel_steps(p.in_h, p.in_w, channels);
  const int i0 = thread.pixel * kHeldPixels;
  Vector<T, V> bias{};
  if (a.bias) {
    DK_UNROLL
    for (int v = 0; v < V; ++v) bias.v[v] = static_cast<T>(a.bias[c + v]);
  }
  Vector<T, V> sum[kHeldPixels];
  DK_UNROLL
  for (int i = 0; i < kHeldPixels; ++i) sum[i] = bias;
  HeldCells<T, V, kKernel> cell;
  for (int t = 0; t < taps; ++t) {
    DK_UNROLL
    for (int i = 0; i < kHeldPixels; ++i) {
      const int j = t * kPixels + i0 + i;
      const TapIndex at = shared.index[j];
      cell.hold(at.cell, weight, cell_steps);
      Vector<T, V> x{};
      if (kData || at.pixel >= 0) {
        const scalar_t* from = input[at.pixel];
        if constexpr (kData) {
          const Vector<T, 4> coef = shared.data_coef[j];
          DK_UNROLL
          for (int k = 0; k < 4; ++k) add_scaled(x, coef.v[k], load<V>(from + pixel_steps[k]));
        } else {
          x = load<V>(from);
        }
      }
      Vector<T, V> w{};
      if constexpr (kKernel) {
        const Vector<T, 4> coef = shared.kernel_coef[j];
        DK_UNROLL
        for (int k = 0; k < 4; ++k) add_scaled(w, coef.v[k], cell.v[k]);
      } else {
        w = cell.v[0];
      }
      // Also in the padding, where x is 0: the NaN of an offset shows in its output.
      DK_UNROLL
      for (int v = 0; v < V; ++v) sum[i].v[v] += x.v[v] * w.v[v];
    }
  }
  DK_UNROLL
  for (int i = 0; i < kHeldPixels; ++i) {
    if (i0 + i < tile.count) store<V>(a.output + (first + i0 + i) * channels + c, sum[i]);
  }
}

template <typename scalar_t>
void launch_forward(const ForwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const int64_t tiles = (p.batch * p.out_h * p.out_w + kPixels - 1) / kPixels;
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    const size_t bytes =
        shared_layout<scalar_t>(a.channels.vector, p.taps(), p.cells(), 0, kKernel, kData).bytes;
    const auto run = [&](auto kernel_function) {
      launch(kernel_function, tiles * a.channels.tiles, kPixels / kHeldPixels * a.channels.lanes,
             bytes, stream, a);
    };
    if (a.channels.vector == 1) return run(forward_kernel<scalar_t, 1, 0, 0, kKernel, kData>);
    dispatch_sizes<kKernel>(p, [&](auto k, auto s) {
      run(forward_kernel<scalar_t, 16 / sizeof(scalar_t), decltype(k)::value, decltype(s)::value,
                         kKernel, kData>);
    });
  });
}

// ---- contiguous ---------------------------------------------------------------------------------

// One thread per output pixel, which keeps its taps in registers and runs over a tile of channels:
// neighbouring threads read neighbouring pixels, and the at most 32 cells that they look up of one
// channel lie in different banks of shared memory.
constexpr int kNchwThreads = 128, kNchwChannels = 32;

template <typename scalar_t, int K, int S>
__global__ void __launch_bounds__(kNchwThreads) forward_nchw_kernel(const ForwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  constexpr int taps = K * K, cells = S * S;
  DK_SHARED_MEMORY(memory);
  T* weight = reinterpret_cast<T*>(memory);  // [kNchwChannels, cells]
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int channels = static_cast<int>(p.channels);
  const int tiles = (channels + kNchwChannels - 1) / kNchwChannels;
  const int begin = static_cast<int>(blockIdx.x % tiles) * kNchwChannels;
  const int end = begin + kNchwChannels < channels ? begin + kNchwChannels : channels;
  for (int j = threadIdx.x; j < (end - begin) * cells; j += blockDim.x) {
    weight[j] = static_cast<T>(a.weight[static_cast<int64_t>(begin) * cells + j]);
  }
  __syncthreads();

  const int64_t in_size = p.in_h * p.in_w, out_size = p.out_h * p.out_w;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x / tiles) * kNchwThreads + threadIdx.x;
  if (pixel >= p.batch * out_size) return;
  const int64_t n = pixel / out_size;
  const int position = static_cast<int>(pixel - n * out_size);
  const int h = position / static_cast<int>(p.out_w), w = position % static_cast<int>(p.out_w);
  Vector<T, 4> coef[taps];
  int cell[taps], from[taps];
  DK_UNROLL
  for (int t = 0; t < taps; ++t) {
    const auto sample = sample_weight(p, size, a.kernel_offset, n, t, h, w);
    const int y = rest_position(h, p.stride_h, p.pad_h, t / K, p.dilation_h);
    const int x = rest_position(w, p.stride_w, p.pad_w, t % K, p.dilation_w);
    const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
    from[t] = inside ? y * static_cast<int>(p.in_w) + x : -1;
    cell[t] = sample.h.cell * S + sample.w.cell;
    coef[t] = sample.coef();
  }
  const scalar_t* input = a.input + (n * channels + begin) * in_size;
  scalar_t* output = a.output + (n * channels + begin) * out_size + position;
  for (int c = begin; c < end; ++c) {
    T sum = a.bias ? static_cast<T>(a.bias[c]) : T(0);
    DK_UNROLL
    for (int t = 0; t < taps; ++t) {
      const T x = from[t] < 0 ? T(0) : static_cast<T>(input[from[t]]);
      const T* at = weight + cell[t];
      const T value = coef[t].v[0] * at[0] + coef[t].v[1] * at[1] + coef[t].v[2] * at[S] +
                      coef[t].v[3] * at[S + 1];
      sum += x * value;
    }
    *output = static_cast<scalar_t>(sum);
    input += in_size;
    output += out_size;
    weight += cells;
  }
}

template <typename scalar_t>
void launch_forward_nchw(const ForwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t blocks = (pixels + kNchwThreads - 1) / kNchwThreads *
                         ((p.channels + kNchwChannels - 1) / kNchwChannels);
  const size_t bytes = sizeof(opmath_t<scalar_t>) * kNchwChannels * p.cells();
  const auto run = [&](auto kernel_function) {
    launch(kernel_function, blocks, kNchwThreads, bytes, stream, a);
  };
  switch (p.scope_h) {
    case 3: return run(forward_nchw_kernel<scalar_t, 3, 3>);
    case 4: return run(forward_nchw_kernel<scalar_t, 3, 4>);
    case 5: return run(forward_nchw_kernel<scalar_t, 3, 5>);
  }
  DK_CHECK(false, "no NCHW kernel for scope ", p.scope_h);
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_FORWARD(scalar_t)                                         \
  namespace dk {                                                                 \
  namespace cuda {                                                               \
  template void launch_forward(const ForwardArgs<scalar_t>&, cudaStream_t);      \
  template void launch_forward_nchw(const ForwardArgs<scalar_t>&, cudaStream_t); \
  }                                                                              \
  }

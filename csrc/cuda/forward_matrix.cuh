// The forward kernel on tensor cores: depthwise, channels_last, without data_offset, K = 3, S = 3
// or 4, stride and dilation 1. How it samples: matrix_taps.cuh.
#pragma once

#include <algorithm>

#include "matrix_taps.cuh"

namespace dk {
namespace cuda {

// What tensor cores are given: float16 has more bits than bfloat16, and coefficients need no range.
template <typename scalar_t>
using forward_half_t =
    std::conditional_t<std::is_same_v<scalar_t, c10::BFloat16>, c10::BFloat16, c10::Half>;

template <typename scalar_t, int S>
__global__ void __launch_bounds__(kMatrixThreads, kForwardBlocks)
    forward_matrix_kernel(const ForwardArgs<scalar_t> a) {
  using half_t = forward_half_t<scalar_t>;
  using Scope = ScopeMatrix<scalar_t, S, half_t>;
  using Taps = MatrixTaps<half_t>;
  constexpr int V = Scope::V;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<3, S> size(p);
  const int channels = static_cast<int>(p.channels), lanes = a.channels.lanes;
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const Taps taps(memory);
  float* scale = reinterpret_cast<float*>(memory + Taps::bytes);  // [lanes * V]
  const StagedTile<scalar_t> stage(memory + Taps::bytes + lanes * V * sizeof(float), lanes);

  const int warps = lanes / kWarpVectors;  // side by side in a tile of channels
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
  // The tiles of channels of one tile of pixels run next to each other: its offsets stay in cache.
  const int first_channel = static_cast<int>(blockIdx.x % a.channels.tiles) * lanes * V;
  const int own = warp % warps * kWarpVectors;  // the warp's first vector in the tile
  const int begin = first_channel + own * V;
  const Scope scope(a.weight, begin, channels, warp < warps ? scale + own * V : nullptr);
  const int c[2] = {begin + q * V, begin + (4 + q) * V};
  const int place = taps.position(g, q);

  const int64_t tiles = matrix_tiles(p.batch, p.out_h, p.out_w);
  for (int64_t index = blockIdx.x / a.channels.tiles; index < tiles;
       index += gridDim.x / a.channels.tiles) {
    const ImageTile tile(index, p.out_h, p.out_w);
    stage.start(a.input + tile.n * p.in_h * p.in_w * channels, tile.h - static_cast<int>(p.pad_h),
                tile.w - static_cast<int>(p.pad_w), in_h, in_w, first_channel, channels, lanes);
    const auto locate = [&](int j) {
      const int t = j / Taps::pixels, i = j % Taps::pixels;
      // Of a pixel that the image does not have, what the last one reads: nobody looks at the
      // result.
      const int h = tile.h + i / kMatrixColumns, w = tile.w + i % kMatrixColumns;
      return locate_in_scope(size, a.kernel_offset, tile.n, t, h < out_h ? h : out_h - 1,
                             w < out_w ? w : out_w - 1);
    };
    Location<float> next = locate(threadIdx.x);
    for (int j = threadIdx.x; j < Taps::pairs; j += kMatrixThreads) {
      const Location<float> at = next;  // while it is used, the next is under way
      if (j + kMatrixThreads < Taps::pairs) next = locate(j + kMatrixThreads);
      taps.clear(j - lane);
      taps.store(j, sample_at(p, size, at));
    }
    wait_for_copies();
    __syncthreads();

    for (int i0 = warp / warps * kRowPixels; i0 < Taps::pixels;
         i0 += kMatrixThreads / kWarpSize / warps * kRowPixels) {
      const int row = i0 / kMatrixColumns;
      float sum[V][4] = {};
      DK_UNROLL
      for (int t = 0; t < kMatrixTaps; ++t) {
        const auto* x0 = stage.at(row + t / 3, g + t % 3) + (own + q) * 16;
        const PixelVectors<scalar_t> x(x0, x0 + stage.kColumns * stage.pixel_bytes);
        const CoefMatrix coef(taps, t * Taps::pixels + i0, place);
        DK_UNROLL
        for (int j = 0; j < V; ++j) {
          float weight[4] = {};
          multiply<half_t, kCoefParts - 1>(weight, coef.part, scope.part[j]);
          // Also in the padding, where x is 0: the NaN of an offset shows in its output.
          DK_UNROLL
          for (int k = 0; k < 4; ++k) sum[j][k] += x.at(j, k) * weight[k];
        }
      }
      DK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int h = tile.h + row + i, w = tile.w + g;
        if (h >= out_h || w >= out_w) continue;
        scalar_t* to = a.output + ((tile.n * out_h + h) * out_w + w) * channels;
        DK_UNROLL
        for (int k = 0; k < 2; ++k) {
          if (c[k] >= channels) continue;
          Vector<float, V> total = result_vector<scalar_t>(sum, i, k);
          DK_UNROLL
          for (int v = 0; v < V; ++v) {
            if constexpr (Scope::kScaled) total.v[v] *= scale[c[k] - first_channel + v];
            if (a.bias) total.v[v] += static_cast<float>(a.bias[c[k] + v]);
          }
          store<V>(to + c[k], total);
        }
      }
    }
    __syncthreads();
  }
}

template <typename scalar_t>
void launch_forward_matrix(const ForwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const int lanes = a.channels.lanes;
  const size_t bytes = MatrixTaps<forward_half_t<scalar_t>>::bytes +
                       sizeof(float) * lanes * a.channels.vector +
                       StagedTile<scalar_t>::bytes(lanes);
  // As many blocks as run at once, each with the same channels of several tiles of pixels.
  const int64_t at_once =
      kForwardBlocks * device_attribute(cudaDevAttrMultiProcessorCount) / a.channels.tiles;
  const int64_t tiles = matrix_tiles(p.batch, p.out_h, p.out_w);
  const int64_t blocks = std::clamp<int64_t>(at_once, 1, tiles) * a.channels.tiles;
  const auto run = [&](auto kernel_function) {
    launch(kernel_function, blocks, kMatrixThreads, bytes, stream, a);
  };
  if (p.scope_h == 3) return run(forward_matrix_kernel<scalar_t, 3>);
  run(forward_matrix_kernel<scalar_t, 4>);
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_FORWARD_MATRIX(scalar_t)                                    \
  namespace dk {                                                                   \
  namespace cuda {                                                                 \
  template void launch_forward_matrix(const ForwardArgs<scalar_t>&, cudaStream_t); \
  }                                                                                \
  }

// The forward kernel on tensor cores: depthwise, channels_last, without data_offset, K = 3, S = 3
// or
// 4. How it samples: matrix_taps.cuh.
#pragma once

#include "matrix_taps.cuh"

namespace dk {
namespace cuda {

// What tensor cores are given: float16 has more bits than bfloat16, and coefficients need no range.
template <typename scalar_t>
using forward_half_t =
    std::conditional_t<std::is_same_v<scalar_t, c10::BFloat16>, c10::BFloat16, c10::Half>;
template <typename scalar_t>
using ForwardTaps = MatrixTaps<forward_half_t<scalar_t>, 2, kMatrixPixels>;

template <typename scalar_t, int S>
__global__ void __launch_bounds__(kMatrixThreads, 4)
    forward_matrix_kernel(const ForwardArgs<scalar_t> a) {
  using half_t = forward_half_t<scalar_t>;
  using Scope = ScopeMatrix<scalar_t, S, half_t>;
  constexpr int V = Scope::V;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<3, S> size(p);
  const int channels = static_cast<int>(p.channels);
  const ForwardTaps<scalar_t> taps(memory);
  float* scale = reinterpret_cast<float*>(memory + taps.bytes);  // [lanes * V]

  // The tiles of channels of one tile of pixels run next to each other: its offsets stay in cache.
  const int warps = a.channels.lanes / kWarpVectors;  // side by side in a tile of channels
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
  const int own = warp % warps * kWarpVectors * V;  // the warp's first channel in the tile
  const int begin = static_cast<int>(blockIdx.x % a.channels.tiles) * a.channels.lanes * V + own;
  const int64_t first = static_cast<int64_t>(blockIdx.x / a.channels.tiles) * kMatrixPixels;
  const PixelTile tile(first, p.batch, p.out_h, p.out_w, kMatrixPixels);
  const Scope scope(a.weight, begin, channels, warp < warps ? scale + own : nullptr);
  for (int j = threadIdx.x; j < taps.pairs; j += kMatrixThreads) {
    const int t = j / kMatrixPixels, i = j % kMatrixPixels;
    // Of a pixel that the tile does not have, what the last one reads: nobody looks at the result.
    const Pixel out = tile[i < tile.count ? i : tile.count - 1];
    taps.clear(j - lane);
    taps.store(j, sample_weight<false>(p, size, a.kernel_offset, tile.first_image + out.n, t, out.h,
                                       out.w));
    taps.index[j].pixel = rest_pixel(p, size, t, out);
  }
  __syncthreads();

  const Pixels<scalar_t> input(a.input + tile.first_image * p.in_h * p.in_w * channels, channels);
  const int c[2] = {begin + q * V, begin + (4 + q) * V};
  const bool own_vector[2] = {c[0] < channels, c[1] < channels};
  const int place = taps.position(g, q);
  for (int i0 = warp / warps * kRowPixels; i0 < tile.count;
       i0 += kMatrixThreads / kWarpSize / warps * kRowPixels) {
    float sum[V][4] = {};
    for (int t = 0; t < kMatrixTaps; ++t) {
      const int pair = t * kMatrixPixels + i0;
      const PixelVectors<scalar_t> x(input, taps.index[pair + g].pixel,
                                     taps.index[pair + g + 8].pixel, c, own_vector);
      const CoefMatrix<2> coef(taps, pair, place);
      DK_UNROLL
      for (int j = 0; j < V; ++j) {
        float weight[4] = {};
        multiply<half_t, 1>(weight, coef.part, scope.part[j]);
        // Also in the padding, where x is 0: the NaN of an offset shows in its output.
        DK_UNROLL
        for (int k = 0; k < 4; ++k) sum[j][k] += x.at(j, k) * weight[k];
      }
    }
    DK_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i0 + g + 8 * i >= tile.count) continue;
      DK_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (!own_vector[k]) continue;
        Vector<float, V> total = result_vector<scalar_t>(sum, i, k);
        DK_UNROLL
        for (int v = 0; v < V; ++v) {
          if constexpr (Scope::kScaled) total.v[v] *= scale[c[k] - begin + own + v];
          if (a.bias) total.v[v] += static_cast<float>(a.bias[c[k] + v]);
        }
        store<V>(a.output + (first + i0 + g + 8 * i) * channels + c[k], total);
      }
    }
  }
}

template <typename scalar_t>
void launch_forward_matrix(const ForwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const int64_t tiles = (p.batch * p.out_h * p.out_w + kMatrixPixels - 1) / kMatrixPixels;
  const size_t bytes =
      ForwardTaps<scalar_t>::bytes + sizeof(float) * a.channels.lanes * a.channels.vector;
  const auto run = [&](auto kernel_function) {
    launch(kernel_function, tiles * a.channels.tiles, kMatrixThreads, bytes, stream, a);
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

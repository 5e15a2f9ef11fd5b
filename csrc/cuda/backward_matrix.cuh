// The backward kernel on tensor cores: depthwise, channels_last, in 16 bits, without data_offset,
// K = 3, S = 3 or 4, stride and dilation 1. Like backward_kernel, by input pixels q; of a tap t,
// which feeds output pixel p, with x = input[q] and g = grad_output[p]:
//
//   weight[q, c]        = sum over cells of coef[q, cell] * scope[c, cell]
//   grad_input[q]      += g * weight[q]
//   grad_coef[q, cell]  = sum over channels of (g * x)[q, c] * scope[c, cell]
//   grad_scope[c, cell] = sum over pixels and taps of coef[q, cell] * (g * x)[q, c]
//
// Three are products of matrices (matrix_taps.cuh), of bfloat16, which has float32's range.
#pragma once

#include "backward.cuh"
#include "matrix_taps.cuh"

namespace dk {
namespace cuda {

// Of g * x and of the scope: of bfloat16, products are rounded as if they were stored; float16's
// have more bits than bfloat16, as the scope has.
template <typename scalar_t>
constexpr int kProductParts = kParts<scalar_t, c10::BFloat16>;
using BackwardTaps = MatrixTaps<c10::BFloat16>;

// Bytes of shared memory, and where its arrays begin:
//   taps     BackwardTaps
//   cell     [pairs]         int, the first of the 2x2 that the tap reads, as 4 * row + column
//   sample   [pairs]         TapSample<float>
//   sums     [warps, pairs]  Vector<float, 4>, gradients of the coefficients
//   stage    StagedTile of grad_output
struct BackwardLayout {
  size_t cell, sample, sums, stage, bytes;
};
template <typename scalar_t>
DK_INLINE BackwardLayout backward_layout() {
  constexpr int lanes = kBackwardLanes;
  using Taps = BackwardTaps;
  BackwardLayout s;
  s.cell = Taps::bytes;
  s.sample = s.cell + sizeof(int) * Taps::pairs;
  s.sums = s.sample + sizeof(TapSample<float>) * Taps::pairs;
  s.stage = s.sums + sizeof(Vector<float, 4>) * Taps::pairs * (lanes / kWarpVectors);
  s.bytes = s.stage + StagedTile<scalar_t>::bytes(lanes);
  return s;
}

// The scope as the right factor of products over channels: of 16 channels, those of products 2s and
// 2s + 1, and 8 cells. part[s][m]: the cells whose columns have m for their higher bit.
template <typename scalar_t, int S>
struct CellMatrix {
  static constexpr int V = 16 / sizeof(scalar_t), P = kProductParts<scalar_t>;
  uint32_t part[V / 2][2][P][2];

  DK_INLINE CellMatrix(const scalar_t* weight, int begin, int channels, int g, int q) {
    DK_UNROLL
    for (int s = 0; s < V / 2; ++s) {
      DK_UNROLL
      for (int m = 0; m < 2; ++m) {
        const int cell = matrix_cell(g) + 2 * m, row = cell / 4, column = cell % 4;
        DK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int c = begin + matrix_channel<V>(2 * s + half, 2 * q);
          float value[2] = {};
          DK_UNROLL
          for (int e = 0; e < 2; ++e) {
            if (row < S && column < S && c + e < channels) {
              value[e] = static_cast<float>(
                  weight[static_cast<int64_t>(c + e) * (S * S) + row * S + column]);
            }
          }
          uint32_t parts[P];
          split<c10::BFloat16>(value[0], value[1], parts);
          DK_UNROLL
          for (int i = 0; i < P; ++i) part[s][m][i][half] = parts[i];
        }
      }
    }
  }
};

// The cell of a tap that feeds no pixel: of no row of the scope, nor of the one before.
constexpr int kNotFed = -16;

// The gradients of the four coefficients that a tap's pixel has, among those of all cells: thread q
// has those of row q of the scope.
DK_INLINE void store_cell_sums(Vector<float, 4>* to, int cell, int q, const float (&upper)[2],
                               const float (&lower)[2]) {
  const int row = q - (cell >> 2), column = cell & 3;
  if (row != 0 && row != 1) return;
  const float first = column == 0 ? upper[0] : column == 1 ? upper[1] : lower[0];
  const float second = column == 0 ? upper[1] : column == 1 ? lower[0] : lower[1];
  to->v[2 * row] = first;
  to->v[2 * row + 1] = second;
}

template <typename scalar_t, int S>
__global__ void __launch_bounds__(kMatrixThreads, kBackwardBlocks<scalar_t>)
    backward_matrix_kernel(const BackwardArgs<scalar_t> a) {
  using half_t = c10::BFloat16;
  using Taps = BackwardTaps;
  constexpr int V = 16 / sizeof(scalar_t), P = kProductParts<scalar_t>;
  constexpr int lanes = kBackwardLanes, warps = lanes / kWarpVectors;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<3, S> size(p);
  const int channels = static_cast<int>(p.channels);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int pad_h = static_cast<int>(p.pad_h), pad_w = static_cast<int>(p.pad_w);
  const BackwardLayout layout = backward_layout<scalar_t>();
  const Taps taps(memory);
  int* cell = reinterpret_cast<int*>(memory + layout.cell);
  auto* samples = reinterpret_cast<TapSample<float>*>(memory + layout.sample);
  auto* coef_sums = reinterpret_cast<Vector<float, 4>*>(memory + layout.sums);
  const StagedTile<scalar_t> stage(memory + layout.stage, lanes);

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
  const int own = warp % warps, row = warp / warps * 2, i0 = row * kMatrixColumns;
  const int place = taps.position(g, q);
  const Share share(blockIdx.x, a);
  const Offset<float> grad_kernel_offset = of_group(a.grad_kernel_offset, share.group);

  for (int channel_tile = share.first_channels; channel_tile < share.last_channels;
       ++channel_tile) {
    const int first_channel = channel_tile * lanes * V;
    const int begin = first_channel + own * kWarpVectors * V;
    const int c[2] = {begin + q * V, begin + (4 + q) * V};
    const bool own_vector[2] = {c[0] < channels, c[1] < channels};
    const ScopeMatrix<scalar_t, S, half_t> scope(a.weight, begin, channels);
    const CellMatrix<scalar_t, S> cells(a.weight, begin, channels, g, q);
    float scope_sum[V][4] = {};
    for (int64_t index = share.first; index < share.last; ++index) {
      const ImageTile tile(index, p.in_h, p.in_w);
      // The output pixel that a pair of the tile feeds; h < 0: none. The stride is 1.
      // A thread's pairs are of one pixel.
      const int i = static_cast<int>(threadIdx.x) % Taps::pixels;
      const int in_y = tile.h + i / kMatrixColumns, in_x = tile.w + i % kMatrixColumns;
      const int taps_of_pixel = in_y < in_h && in_x < in_w ? kMatrixTaps : 0;
      const auto fed_by = [&](int j) {
        const int t = j / Taps::pixels, h = in_y + pad_h - t / 3, w = in_x + pad_w - t % 3;
        const bool fed = (t < taps_of_pixel) & (h >= 0) & (h < out_h) & (w >= 0) & (w < out_w);
        return Pixel{0, fed ? h : -1, w};
      };
      // Input pixel h feeds output pixels h + pad - tap.
      stage.start(a.grad_output + tile.n * (p.out_h * p.out_w * channels), tile.h + pad_h - 2,
                  tile.w + pad_w - 2, out_h, out_w, first_channel, channels, lanes);
      const auto locate = [&](int j, Location<float>* at) {
        const Pixel out = fed_by(j);
        if (out.h < 0) return false;
        *at = locate_in_scope(size, a.kernel_offset, tile.n, j / Taps::pixels, out.h, out.w);
        return true;
      };
      Location<float> next{};
      bool next_fed = locate(threadIdx.x, &next);
      for (int j = threadIdx.x; j < Taps::pairs; j += kMatrixThreads) {
        const Location<float> at = next;  // while it is used, the next is under way
        const bool fed = next_fed;
        next_fed = locate(j + kMatrixThreads, &next);
        taps.clear(j - lane);
        cell[j] = kNotFed;
        if (!fed) continue;
        samples[j] = sample_at(p, size, at);
        cell[j] = 4 * samples[j].h.cell + samples[j].w.cell;
        taps.store(j, samples[j]);
      }
      const int64_t image = tile.n * (p.in_h * p.in_w * channels);
      const int upper = (tile.h + row) * in_w + tile.w + g;
      const bool inside = tile.w + g < in_w;
      const PixelVectors<scalar_t> x(
          {a.input + image, channels}, inside && tile.h + row < in_h ? upper : -1,
          inside && tile.h + row + 1 < in_h ? upper + in_w : -1, c, own_vector);
      wait_for_copies();
      __syncthreads();

      float grad_x[V][4] = {};
      for (int t = 0; t < kMatrixTaps; ++t) {
        const int pair = t * Taps::pixels + i0;
        const auto* grad0 =
            stage.at(row + 2 - t / 3, g + 2 - t % 3) + (own * kWarpVectors + q) * 16;
        const PixelVectors<scalar_t> grad(grad0, grad0 + stage.kColumns * stage.pixel_bytes);
        const CoefMatrix coef(taps, pair, place);
        uint32_t product[V / 2][P][4];  // g * x, as left factors
        DK_UNROLL
        for (int j = 0; j < V; ++j) {
          float weight[4] = {};
          multiply<half_t, kCoefParts - 1>(weight, coef.part, scope.part[j]);
          DK_UNROLL
          for (int k = 0; k < 2; ++k) {
            uint32_t parts[P];
            if constexpr (P == 1) {
              parts[0] = multiplied(grad.pair(j, k), x.pair(j, k));
            } else {
              split<half_t>(grad.at(j, 2 * k) * x.at(j, 2 * k),
                            grad.at(j, 2 * k + 1) * x.at(j, 2 * k + 1), parts);
            }
            DK_UNROLL
            for (int i = 0; i < P; ++i) product[j / 2][i][j % 2 * 2 + k] = parts[i];
          }
          DK_UNROLL
          for (int k = 0; k < 4; ++k) grad_x[j][k] += grad.at(j, k) * weight[k];
        }

        float coef_sum[2][4] = {};
        DK_UNROLL
        for (int m = 0; m < 2; ++m) {
          DK_UNROLL
          for (int s = 0; s < V / 2; ++s) {
            multiply<half_t, P - 1>(coef_sum[m], product[s], cells.part[s][m]);
          }
        }
        Vector<float, 4>* sums = coef_sums + own * Taps::pairs + pair;
        DK_UNROLL
        for (int i = 0; i < 2; ++i) {
          store_cell_sums(sums + g + 8 * i, cell[pair + g + 8 * i], q,
                          {coef_sum[0][2 * i], coef_sum[0][2 * i + 1]},
                          {coef_sum[1][2 * i], coef_sum[1][2 * i + 1]});
        }

        uint32_t cell_rows[P][4];  // the coefficients, turned: a row is a cell
        DK_UNROLL
        for (int i = 0; i < P; ++i) {
          DK_UNROLL
          for (int k = 0; k < 4; ++k) {
            cell_rows[i][k] = transposed(coef.part[i][k % 2 * 2 + k / 2]);
          }
        }
        DK_UNROLL
        for (int j = 0; j < V; ++j) {
          uint32_t pixel_rows[P][2];
          DK_UNROLL
          for (int i = 0; i < P; ++i) {
            DK_UNROLL
            for (int k = 0; k < 2; ++k) {
              pixel_rows[i][k] = transposed(product[j / 2][i][j % 2 * 2 + k]);
            }
          }
          multiply<half_t, P - 1>(scope_sum[j], cell_rows, pixel_rows);
        }
      }
      const Pixels<scalar_t> grad_input(a.grad_input + image, channels);
      DK_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (tile.h + row + i >= in_h || tile.w + g >= in_w) continue;
        scalar_t* to = grad_input[upper + i * in_w];
        DK_UNROLL
        for (int k = 0; k < 2; ++k) {
          if (own_vector[k]) store<V>(to + c[k], result_vector<scalar_t>(grad_x, i, k));
        }
      }
      __syncthreads();

      for (int j = threadIdx.x; j < Taps::pairs; j += blockDim.x) {
        if (cell[j] == kNotFed) continue;
        const Pixel out = fed_by(j);
        Vector<float, 4> sum = coef_sums[j];
        for (int i = 1; i < warps; ++i) add_scaled(sum, 1.f, coef_sums[i * Taps::pairs + j]);
        add_offset_gradient(grad_kernel_offset, kMatrixTaps, tile.n, j / Taps::pixels, out.h, out.w,
                            samples[j], sum);
      }
      // The same thread fills the same pairs of the next tile: no barrier.
    }

    // The sums over the pixels of the block's upper warps and its lower ones, in place of
    // coefficients, which nobody reads any more.
    float* lower_sums = reinterpret_cast<float*>(memory) + own * V * 4 * kWarpSize + lane;
    if (i0 > 0) {
      DK_UNROLL
      for (int j = 0; j < 4 * V; ++j) lower_sums[j * kWarpSize] = scope_sum[j / 4][j % 4];
    }
    __syncthreads();
    if (i0 == 0) {
      DK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int at = matrix_cell(g) + 2 * i, row = at / 4, column = at % 4;
        if (row >= S || column >= S) continue;
        float* to =
            a.weight_partial + (int64_t(share.split) * (S * S) + row * S + column) * channels;
        DK_UNROLL
        for (int k = 0; k < 2; ++k) {
          if (!own_vector[k]) continue;
          Vector<float, V> total = result_vector<scalar_t>(scope_sum, i, k);
          DK_UNROLL
          for (int v = 0; v < V; ++v) {
            const int j = k * (V / 2) + v / 2;
            total.v[v] += lower_sums[(4 * j + 2 * i + v % 2) * kWarpSize];
          }
          store<V>(to + c[k], total);
        }
      }
    }
    __syncthreads();
  }
}

template <typename scalar_t>
void launch_backward_matrix(const BackwardArgs<scalar_t>& a, cudaStream_t stream) {
  const auto run = [&](auto kernel_function) {
    launch(kernel_function, int64_t(a.splits) * a.groups, kMatrixThreads,
           backward_layout<scalar_t>().bytes, stream, a);
  };
  if (a.params.scope_h == 3) return run(backward_matrix_kernel<scalar_t, 3>);
  run(backward_matrix_kernel<scalar_t, 4>);
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_BACKWARD_MATRIX(scalar_t)                                     \
  namespace dk {                                                                     \
  namespace cuda {                                                                   \
  template void launch_backward_matrix(const BackwardArgs<scalar_t>&, cudaStream_t); \
  }                                                                                  \
  }

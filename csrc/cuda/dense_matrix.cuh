// The forward kernel on tensor cores of dense convolutions in 16 bits: groups = 1, channels_last,
// kernel_offset without data_offset, up to 9 taps and a scope of up to 4x4. The columns of
// csrc/dense.h are made in registers, as the left factor of the product that wants them:
//
//   output[o, p] = bias[o] + sum over c of (sum over cells of weight[o, c, cell] * column[cell, p])
//   column[cell, p] = sum over taps t of coef[t, cell](p) * input[c, p + k_t]
//
// A product of mma.cuh has 16 pixels, two rows of a tile, the 16 cells of one channel, and 8
// outputs. Thread (g, q) holds row q of the scope for pixels g: two cells at 2q and two at 2q + 8,
// as in matrix_taps.cuh. So its coefficients stay in registers for all channels, and nothing is
// exchanged.
//
// Columns are sums of at most 9 numbers of 16 bits, rounded each time, which costs less than the
// two units that rounded columns are allowed (tests/conftest.py): in float32, there would be twice
// as many instructions as tensor cores leave time for, and twice the registers. An input that is
// infinite or NaN makes NaNs of all cells, also of those that no tap reads.
#pragma once

#include "matrix_taps.cuh"  // first, since it has headers of torch that must be

#include "dense_matrix.h"

namespace dk {
namespace cuda {

// The output, counted from the warp's first, that a product has in column `column` < 8. So a thread
// ends up with neighbours.
DK_INLINE int dense_output(int product, int column) {
  return 32 * (product / 4) + 8 * (column / 2) + 2 * (product % 4) + column % 2;
}

// ---- coefficients -------------------------------------------------------------------------------

// What the taps of a warp's pixels read of the scope: two rows of two coefficients, the row of the
// first of these cells, and by how many bits its column moves the coefficients.
template <typename scalar_t>
struct DenseTaps {
  static constexpr int pairs = kMatrixTaps * kDensePixels, bytes = 16 * pairs;
  static_assert(kDenseWarps * bytes <= DenseLayout::weight_bytes);
  Vector<uint32_t, 4>* pair;  // [kMatrixTaps, kDensePixels]

  DK_INLINE explicit DenseTaps(unsigned char* memory)
      : pair(reinterpret_cast<Vector<uint32_t, 4>*>(memory)) {}

  // Each thread of a pixel of its own. Of one that the image does not have, what the last one
  // reads: nobody looks at the result.
  template <typename Sizes>
  __device__ __forceinline__ void fill(const DenseArgs<scalar_t>& a, const Sizes& size,
                                       const ImageTile& tile) const {
    const ConvParams& p = a.params;
    const int i = static_cast<int>(threadIdx.x) % kWarpSize;
    const int last_h = static_cast<int>(p.out_h) - 1, last_w = static_cast<int>(p.out_w) - 1;
    const int h = tile.h + i / kMatrixColumns, w = tile.w + i % kMatrixColumns;
    DK_UNROLL
    for (int t = 0; t < kMatrixTaps; ++t) {
      Vector<uint32_t, 4> words{};
      if (t < size.taps()) {
        const auto sample = sample_weight(p, size, a.kernel_offset, tile.n, t,
                                          h < last_h ? h : last_h, w < last_w ? w : last_w);
        const Vector<float, 4> coef = sample.coef();
        words = {{packed<scalar_t>(coef.v[0], coef.v[1]), packed<scalar_t>(coef.v[2], coef.v[3]),
                  static_cast<uint32_t>(sample.h.cell), static_cast<uint32_t>(16 * sample.w.cell)}};
      }
      pair[t * kDensePixels + i] = words;
    }
  }
  // Row q of the scope, for tap t of pixel i.
  DK_INLINE void read(int t, int i, uint32_t q, uint32_t (&coef)[2]) const {
    const Vector<uint32_t, 4> words = pair[t * kDensePixels + i];
    const uint32_t above = q - words.v[2];
    const uint64_t two = above == 0 ? words.v[0] : above == 1 ? words.v[1] : 0;
    coef[0] = static_cast<uint32_t>(two << words.v[3]);
    coef[1] = static_cast<uint32_t>(two << words.v[3] >> 32);
  }
};

// ---- copies -------------------------------------------------------------------------------------

// What a block copies to shared memory: its weights, and the windows of its warps' tiles.
template <typename scalar_t, bool kUnit>
struct DenseStage {
  unsigned char* memory;
  DenseLayout layout;
  Pixels<const scalar_t> image;
  Pixels<const scalar_t> weight_rows;  // of outputs, from the block's first on
  int* source;                         // the warp's
  int outputs;                         // of the block, or more
  int pixels, warp, lane;

  __device__ __forceinline__ DenseStage(unsigned char* memory, const DenseArgs<scalar_t>& a,
                                        const DenseWindow<kUnit>& window, const ImageTile& tile,
                                        int first)
      : memory(memory),
        layout(window.pixels()),
        image(a.input + tile.n * a.params.in_h * a.params.in_w * a.params.channels,
              static_cast<int>(a.params.channels)),
        weight_rows(a.weight + first * a.params.channels * kDenseCells,
                    static_cast<int>(a.params.channels) * kDenseCells),
        outputs(static_cast<int>(a.params.out_channels) - first),
        pixels(window.pixels()),
        warp(static_cast<int>(threadIdx.x) / kWarpSize),
        lane(static_cast<int>(threadIdx.x) % kWarpSize) {
    const ConvParams& p = a.params;
    const int height = static_cast<int>(p.in_h), width = static_cast<int>(p.in_w);
    source = reinterpret_cast<int*>(memory + layout.source(warp));
    for (int j = lane; j < pixels; j += kWarpSize) {
      const int y = rest_position(tile.h, p.stride_h, p.pad_h, j / window.columns, 1);
      const int x = rest_position(tile.w, p.stride_w, p.pad_w, j % window.columns, 1);
      source[j] = y >= 0 && y < height && x >= 0 && x < width ? y * width + x : -1;
    }
  }

  // Of kDenseChannels channels, the `chunk`th.
  __device__ __forceinline__ void start(int chunk) const {
    unsigned char* to = memory + layout.window(chunk % 2, warp);
    DK_ROLLED
    for (int j = lane; j < pixels; j += kWarpSize) {  // those that this thread has found
      const int pixel = source[j];
      copy_async(to + j * 16, image[pixel >= 0 ? pixel : 0] + chunk * kDenseChannels, pixel >= 0);
    }
    constexpr int kParts = kDenseChannels * kDenseCells * 2 / 16;  // of an output, 16 bytes each
    static_assert(kMatrixThreads == 8 * kParts);                   // a column's each
    const int column = static_cast<int>(threadIdx.x) / kParts, part = threadIdx.x % kParts;
    to = memory + layout.weight(chunk % 2) + column * layout.row_bytes + part * 16;
    DK_ROLLED
    for (int product = 0; product < kDenseProducts; ++product) {
      const int output = dense_output(product, column);
      const scalar_t* from = weight_rows[output < outputs ? output : 0];
      copy_async(to + product * 8 * layout.row_bytes,
                 from + chunk * (kDenseChannels * kDenseCells) + part * 8, output < outputs);
    }
  }
  // The thread's cells of the first channel and output.
  DK_INLINE const unsigned char* weight(int chunk) const {
    return memory + layout.weight(chunk % 2) + lane / 4 * layout.row_bytes + lane % 4 * 8;
  }
  DK_INLINE const unsigned char* window(int chunk) const {
    return memory + layout.window(chunk % 2, warp);
  }
};

// ---- the product --------------------------------------------------------------------------------

// Of two channels: the left factor of each two rows of pixels. `pixels`: the window, from the
// column on that pixel g of the first tap has.
template <typename scalar_t, bool kUnit>
struct DenseColumns {
  uint32_t part[2][kDenseRows / 2][4] = {};

  DK_INLINE DenseColumns(const DenseWindow<kUnit>& window, int taps, const unsigned char* pixels,
                         const uint32_t (&coef)[kDenseRows][kMatrixTaps][2]) {
    DK_UNROLL
    for (int i = 0; i < kDenseRows; ++i) {
      DK_UNROLL
      for (int t = 0; t < kMatrixTaps; ++t) {
        const int at = window.row(i) + window.tap(t < taps ? t : 0);
        const auto both = *reinterpret_cast<const uint32_t*>(pixels + at);
        DK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const uint32_t x = doubled(both, c);
          DK_UNROLL
          for (int k = 0; k < 2; ++k) {
            uint32_t& cells = part[c][i / 2][2 * k + i % 2];
            cells = multiply_add<scalar_t>(coef[i][t][k], x, cells);
          }
        }
      }
    }
  }
};

// A warp's results: of each pixel, a thread has eight neighbouring outputs, and as many 32 further.
template <typename scalar_t>
__device__ __forceinline__ void store_outputs(
    const DenseArgs<scalar_t>& a, const ImageTile& tile, int first,
    const float (&sum)[kDenseRows / 2][kDenseProducts][4]) {
  const ConvParams& p = a.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
  DK_UNROLL
  for (int i = 0; i < kDenseRows; ++i) {
    const int h = tile.h + i, w = tile.w + g;
    if (h >= p.out_h || w >= p.out_w) continue;
    scalar_t* to = a.output + ((tile.n * p.out_h + h) * p.out_w + w) * p.out_channels;
    DK_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int output = first + 32 * k + 8 * q;
      if (output >= p.out_channels) continue;
      Vector<float, 8> outputs;
      DK_UNROLL
      for (int j = 0; j < 8; ++j) outputs.v[j] = sum[i / 2][4 * k + j / 2][i % 2 * 2 + j % 2];
      store<8>(to + output, outputs);
    }
  }
}

// A block: kDenseOutputs outputs of a tile of pixels to each warp. Those of one tile run next to
// each other: its pixels stay in cache.
template <typename scalar_t, bool kUnit>
__global__ void __launch_bounds__(kMatrixThreads, kDenseBlocks<kUnit>)
    dense_matrix_kernel(const DenseArgs<scalar_t> a) {
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<kUnit ? 3 : 0, 0> size(p);
  const DenseWindow<kUnit> window(p);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int output_tiles = static_cast<int>(dense_output_tiles(p));
  const int first = static_cast<int>(blockIdx.x % output_tiles) * kDenseOutputs;
  const int64_t tiles = matrix_tiles(p.batch, p.out_h, p.out_w);
  const int64_t index = static_cast<int64_t>(blockIdx.x / output_tiles) * kDenseWarps + warp;
  // A warp too many does as the last one, but for the results.
  const ImageTile tile(index < tiles ? index : tiles - 1, p.out_h, p.out_w);
  const DenseStage<scalar_t, kUnit> stage(memory, a, window, tile, first);
  stage.start(0);

  const DenseTaps<scalar_t> taps(memory + stage.layout.weight(1) +
                                 warp * DenseTaps<scalar_t>::bytes);
  taps.fill(a, size, tile);
  __syncwarp();
  uint32_t coef[kDenseRows][kMatrixTaps][2];
  DK_UNROLL
  for (int i = 0; i < kDenseRows; ++i) {
    DK_UNROLL
    for (int t = 0; t < kMatrixTaps; ++t) {
      taps.read(t, i * kMatrixColumns + g, q, coef[i][t]);
    }
  }

  float sum[kDenseRows / 2][kDenseProducts][4];
  DK_UNROLL
  for (int product = 0; product < kDenseProducts; ++product) {
    DK_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int output = first + dense_output(product, 2 * q + k);
      const bool has = a.bias && output < p.out_channels;
      const float bias = has ? static_cast<float>(a.bias[output]) : 0.0f;
      DK_UNROLL
      for (int i = 0; i < kDenseRows; ++i) sum[i / 2][product][i % 2 * 2 + k] = bias;
    }
  }

  const int chunks = static_cast<int>(p.channels) / kDenseChannels;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies();
    __syncthreads();
    if (chunk + 1 < chunks) stage.start(chunk + 1);
    const unsigned char* weight = stage.weight(chunk);
    const unsigned char* pixels = stage.window(chunk) + g * window.stride_w * 16;
    DK_ROLLED
    for (int c = 0; c < kDenseChannels; c += 2) {
      const DenseColumns<scalar_t, kUnit> columns(window, size.taps(), pixels, coef);
      DK_UNROLL
      for (int k = 0; k < 2; ++k) {
        DK_UNROLL
        for (int j = 0; j < kDenseProducts; ++j) {
          const auto cells = *reinterpret_cast<const Vector<uint32_t, 2>*>(
              weight + j * 8 * stage.layout.row_bytes + k * kDenseCells * 2);
          DK_UNROLL
          for (int i = 0; i < kDenseRows / 2; ++i) {
            mma<scalar_t>(sum[i][j], columns.part[k][i], cells.v);
          }
        }
      }
      pixels += 2 * 2;
      weight += 2 * kDenseCells * 2;
    }
  }
  if (index < tiles) store_outputs(a, tile, first, sum);
}

// ---- launch -------------------------------------------------------------------------------------

template <typename scalar_t>
void launch_dense_matrix(const DenseArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const int64_t tiles = matrix_tiles(p.batch, p.out_h, p.out_w);
  const int64_t blocks = (tiles + kDenseWarps - 1) / kDenseWarps * dense_output_tiles(p);
  const DenseLayout layout(DenseWindow<false>(p).pixels());
  launch(is_unit(p) ? dense_matrix_kernel<scalar_t, true> : dense_matrix_kernel<scalar_t, false>,
         blocks, kMatrixThreads, layout.bytes(), stream, a);
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_DENSE_MATRIX(scalar_t)                                  \
  namespace dk {                                                               \
  namespace cuda {                                                             \
  template void launch_dense_matrix(const DenseArgs<scalar_t>&, cudaStream_t); \
  }                                                                            \
  }

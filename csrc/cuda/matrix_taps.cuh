// What the kernels that sample the scope by matrix products share. Sizes: tiles.cuh.
//
// A tap samples the scope linearly, so of 16 pixels and 8 channels, the weights
//
//   weight[pixel, channel] = sum over cells of coef[pixel, cell] * scope[channel, cell]
//
// are one product of matrices, of the inner size that tensor cores have: a scope of up to 4x4 has
// 16 cells. Tensor cores multiply numbers of 16 bits. More precise ones are split into two parts,
// the rounded number and what that leaves of it; of the products of parts, that of the second ones
// does not count. Sums are float32.
//
// A warp takes 16 pixels at a time, 8 of a row and those below, and of each, 8 vectors of channels.
// Thread (g, q) of mma.cuh has pixels g and g + 8, and of both, vectors q and 4 + q. So the columns
// of the products are not channels in their order, nor are the 16 inner ones cells: thread q has
// two at 2q and two at 2q + 8, the four columns of row q of the scope.
#pragma once

#include "mma.cuh"

namespace dk {
namespace cuda {

constexpr int kRowPixels = 2 * kMatrixColumns, kWarpVectors = 8;

// Channel of column `column` of product `j`, counted from the warp's first.
template <int V>
DK_INLINE int matrix_channel(int j, int column) {
  return (4 * (j / (V / 2)) + column / 2) * V + 2 * (j % (V / 2)) + column % 2;
}

// Cell, as 4 * row + column, of inner column `column` < 8; 2 more: of the one 8 further.
DK_INLINE int matrix_cell(int column) { return 4 * (column / 2) + column % 2; }

// ---- parts of numbers ---------------------------------------------------------------------------

template <typename half_t, int kParts>
DK_INLINE void split(float first, float second, uint32_t (&part)[kParts]) {
  DK_UNROLL
  for (int i = 0; i < kParts; ++i) {
    part[i] = packed<half_t>(first, second);
    first -= unpacked<half_t>(part[i], 0);
    second -= unpacked<half_t>(part[i], 1);
  }
}

// Parts in which a number of type scalar_t is exact, but for the last two bits of float32.
template <typename scalar_t, typename half_t>
constexpr int kParts = std::is_same_v<scalar_t, half_t> ? 1 : 2;
// Of coefficients.
constexpr int kCoefParts = 2;

// d += a * b of parts whose numbers are `kLast` together, at most; the small ones first: so they
// lose less.
template <typename half_t, int kLast, int A, int B>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[A][4],
                                         const uint32_t (&b)[B][2]) {
  DK_UNROLL
  for (int part = kLast; part >= 0; --part) {
    DK_UNROLL
    for (int i = 0; i <= part; ++i) {
      if (i < A && part - i < B) mma<half_t>(d, a[i], b[part - i]);
    }
  }
}

// A vector of channels as it is stored, in 16 bytes.
template <typename scalar_t>
struct Stored {
  uint32_t word[4];

  DK_INLINE Stored(bool reads, const scalar_t* from) {
    Vector<uint32_t, 4> words{};
    if (reads) words = *reinterpret_cast<const Vector<uint32_t, 4>*>(from);
    DK_UNROLL
    for (int k = 0; k < 4; ++k) word[k] = words.v[k];
  }
  DK_INLINE float operator[](int v) const {
    if constexpr (std::is_same_v<scalar_t, float>) return float_of_bits(word[v]);
    return unpacked<scalar_t>(word[v / 2], v % 2);
  }
};

// What a thread has of 16 pixels: vectors q and 4 + q of pixels g and g + 8.
template <typename scalar_t>
struct PixelVectors {
  static constexpr int V = 16 / sizeof(scalar_t);
  Stored<scalar_t> vector[2][2];

  // Pixels of `rows` whose numbers are not negative, channels `c` that are `own`.
  DK_INLINE PixelVectors(const Pixels<const scalar_t>& rows, int upper, int lower,
                         const int (&c)[2], const bool (&own)[2])
      : vector{{read(rows, upper, c[0], own[0]), read(rows, upper, c[1], own[1])},
               {read(rows, lower, c[0], own[0]), read(rows, lower, c[1], own[1])}} {}

  // From shared memory, at the thread's first vector of each pixel.
  DK_INLINE PixelVectors(const unsigned char* upper, const unsigned char* lower)
      : vector{{at_address(upper), at_address(upper + 64)},
               {at_address(lower), at_address(lower + 64)}} {}

  // The two numbers of pixel g (half = 0) or g + 8 that product `j` has.
  DK_INLINE uint32_t pair(int j, int half) const {
    static_assert(V == 8);
    return vector[half][j / 4].word[j % 4];
  }
  // As product `j` has them: k = 0, 1 of pixel g; k = 2, 3 of pixel g + 8.
  DK_INLINE float at(int j, int k) const {
    return vector[k / 2][j / (V / 2)][2 * (j % (V / 2)) + k % 2];
  }

 private:
  static DK_INLINE Stored<scalar_t> at_address(const unsigned char* address) {
    return Stored<scalar_t>(true, reinterpret_cast<const scalar_t*>(address));
  }
  static DK_INLINE Stored<scalar_t> read(const Pixels<const scalar_t>& rows, int pixel, int c,
                                         bool own) {
    return Stored<scalar_t>((pixel >= 0) & own, rows[pixel] + c);
  }
};

// The vectors of one pixel, of a result that is laid out as at(j, k).
template <typename scalar_t, int V>
DK_INLINE Vector<float, V> result_vector(const float (&result)[V][4], int pixel, int vector) {
  Vector<float, V> x;
  DK_UNROLL
  for (int v = 0; v < V; ++v) {
    x.v[v] = result[vector * (V / 2) + v / 2][2 * pixel + v % 2];
  }
  return x;
}

// ---- tiles of an image --------------------------------------------------------------------------

// Tile number `tile` of all: kMatrixColumns columns and kMatrixRows rows of one image, at h, w.
struct ImageTile {
  int64_t n;
  int h, w;
  DK_INLINE ImageTile(int64_t tile, int64_t height, int64_t width) {
    const auto number = static_cast<unsigned>(tile);  // has_matrix_kernel
    const auto across = static_cast<unsigned>((width + kMatrixColumns - 1) / kMatrixColumns);
    const auto down = static_cast<unsigned>((height + kMatrixRows - 1) / kMatrixRows);
    w = static_cast<int>(number % across) * kMatrixColumns;
    h = static_cast<int>(number / across % down) * kMatrixRows;
    n = number / across / down;
  }
};

// What a tile's taps read of an image, in shared memory: rows and columns around it by 3x3 taps,
// zeros outside the image, of a tile of channels. A pixel's vectors begin 64 bytes after a multiple
// of 128 behind those of the pixel before, so that threads of two pixels use all banks.
template <typename scalar_t>
struct StagedTile {
  static constexpr int kColumns = kMatrixColumns + 2, kPixelCount = (kMatrixRows + 2) * kColumns;
  unsigned char* memory;
  int pixel_bytes;

  static DK_INLINE int bytes_of_pixel(int lanes) { return lanes * 16 + 64; }
  static DK_INLINE int bytes(int lanes) { return kPixelCount * bytes_of_pixel(lanes); }
  DK_INLINE StagedTile(unsigned char* memory, int lanes)
      : memory(memory), pixel_bytes(bytes_of_pixel(lanes)) {}

  // Channels `begin` and following of `image`, [height, width, channels], from pixel (h, w) on.
  __device__ __forceinline__ void start(const scalar_t* image, int h, int w, int height, int width,
                                        int begin, int channels, int lanes) const {
    constexpr int V = 16 / sizeof(scalar_t), kCopies = 4;  // of a thread and a pixel
    const unsigned threads = static_cast<unsigned>(lanes) / kCopies;
    const int vector = static_cast<int>(threadIdx.x % threads);
    const Pixels<const scalar_t> pixels(image + begin + vector * V, channels);
    for (unsigned j = threadIdx.x / threads; j < kPixelCount; j += blockDim.x / threads) {
      const int y = h + static_cast<int>(j / kColumns), x = w + static_cast<int>(j % kColumns);
      const bool inside = (y >= 0) & (y < height) & (x >= 0) & (x < width);
      const scalar_t* from = pixels[inside ? y * width + x : 0];
      unsigned char* to = memory + static_cast<int>(j) * pixel_bytes + vector * 16;
      DK_UNROLL
      for (int k = 0; k < kCopies; ++k) {
        const int next = k * static_cast<int>(threads);
        const bool reads = inside & (begin + (vector + next) * V < channels);
        copy_async(to + next * 16, reads ? from + next * V : image, reads);
      }
    }
  }
  // Vectors of the pixel `row` rows and `column` columns after the first.
  DK_INLINE const unsigned char* at(int row, int column) const {
    return memory + (row * kColumns + column) * pixel_bytes;
  }
};

// ---- coefficients -------------------------------------------------------------------------------

// Of every tap of a tile's pixels, in shared memory: its coefficients on all 16 cells. They lie as
// a thread wants them, 16 bytes for two pixels and a row of the scope: columns 0 and 1 of pixel g,
// of pixel g + 8, columns 2 and 3 of both.
template <typename half_t>
struct MatrixTaps {
  static constexpr int pixels = kMatrixRows * kMatrixColumns, pairs = kMatrixTaps * pixels;
  static constexpr int row_bytes = kScopeRows * 8, part_bytes = pairs * row_bytes;
  static constexpr int bytes = kCoefParts * part_bytes;

  unsigned char* coef;  // [kCoefParts, kMatrixTaps, pixels / 2, kScopeRows, 16]

  DK_INLINE explicit MatrixTaps(unsigned char* memory) : coef(memory) {}

  // Of `pair` (a multiple of 16, plus g) and the pair 8 pixels away. Rows are turned, so that eight
  // neighbouring threads, of eight pixels or of two, use all banks.
  static DK_INLINE unsigned position(unsigned pair, unsigned scope_row) {
    return ((pair / kRowPixels * 8 + pair % 8) * kScopeRows + (scope_row + pair / 2) % kScopeRows) *
           16;
  }

  // Of the pairs of a whole warp, from `first` on.
  __device__ __forceinline__ void clear(int first) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    DK_UNROLL
    for (int k = 0; k < kCoefParts * row_bytes / 16; ++k) {
      const int part = k / (row_bytes / 16), chunk = k % (row_bytes / 16) * kWarpSize + lane;
      *reinterpret_cast<Vector<uint32_t, 4>*>(coef + part * part_bytes + first * row_bytes +
                                              chunk * 16) = {};
    }
    __syncwarp();
  }

  // The four cells that a sample reads; the others are clear.
  DK_INLINE void store(unsigned pair, const TapSample<float>& sample) const {
    DK_UNROLL
    for (int k = 0; k < 2; ++k) {
      uint32_t part[kCoefParts];
      split<half_t>(sample.h.coef[k] * sample.w.coef[0], sample.h.coef[k] * sample.w.coef[1], part);
      const unsigned at = position(pair, sample.h.cell + k) + pair % kRowPixels / 8 * 4;
      DK_UNROLL
      for (int i = 0; i < kCoefParts; ++i) {
        const uint64_t columns = uint64_t(part[i]) << (16 * sample.w.cell);
        auto* to = reinterpret_cast<uint32_t*>(coef + i * part_bytes + at);
        to[0] = static_cast<uint32_t>(columns);
        to[2] = static_cast<uint32_t>(columns >> 32);
      }
    }
  }
};

// Coefficients of 16 pixels, from `pair` on, as the left factor of a product. `place` is the
// thread's position(g, q).
struct CoefMatrix {
  uint32_t part[kCoefParts][4];

  template <typename Taps>
  DK_INLINE CoefMatrix(const Taps& taps, int pair, int place) {
    DK_UNROLL
    for (int i = 0; i < kCoefParts; ++i) {
      const auto row = *reinterpret_cast<const Vector<uint32_t, 4>*>(
          taps.coef + i * taps.part_bytes + pair * taps.row_bytes + place);
      DK_UNROLL
      for (int k = 0; k < 4; ++k) part[i][k] = row.v[k];
    }
  }
};

// ---- the scope ----------------------------------------------------------------------------------

// 2^-e and 2^e, where the greatest |x| of a channel's cells is in [2^e, 2^(e+1)): float16 has no
// room for all that float32 has.
struct Scale {
  float to, from;
  DK_INLINE explicit Scale(float greatest) {
    uint32_t exponent;
    memcpy(&exponent, &greatest, sizeof exponent);
    exponent >>= 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    to = float_of_bits((254 - exponent) << 23);
    from = float_of_bits(exponent << 23);
  }
};

// The cells of a warp's channels as the right factor of V products.
template <typename scalar_t, int S, typename half_t>
struct ScopeMatrix {
  static constexpr int V = 16 / sizeof(scalar_t), kScopeParts = kParts<scalar_t, half_t>;
  static constexpr bool kScaled =
      std::is_same_v<scalar_t, float> && std::is_same_v<half_t, c10::Half>;
  uint32_t part[V][kScopeParts][2];

  // Channels `begin` and following of `weight`, [channels, S*S]. If kScaled, leaves in `scale`, if
  // that is not null, what the channels' sums are to be multiplied by.
  __device__ __forceinline__ ScopeMatrix(const scalar_t* weight, int begin, int channels,
                                         float* scale = nullptr) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
    DK_UNROLL
    for (int j = 0; j < V; ++j) {
      const int c = matrix_channel<V>(j, g);
      float cell[4] = {};
      if (begin + c < channels && q < S) {
        const scalar_t* from = weight + static_cast<int64_t>(begin + c) * (S * S) + q * S;
        if constexpr (S == 4) {
          const Vector<float, 4> row = load<4>(from);
          DK_UNROLL
          for (int k = 0; k < 4; ++k) cell[k] = row.v[k];
        } else {
          DK_UNROLL
          for (int k = 0; k < S; ++k) cell[k] = static_cast<float>(from[k]);
        }
      }
      if constexpr (kScaled) {
        float greatest =
            fmaxf(fmaxf(fabsf(cell[0]), fabsf(cell[1])), fmaxf(fabsf(cell[2]), fabsf(cell[3])));
        greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
        greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
        const Scale s(greatest);
        if (scale && q == 0) scale[c] = s.from;
        DK_UNROLL
        for (int k = 0; k < 4; ++k) cell[k] *= s.to;
      }
      DK_UNROLL
      for (int k = 0; k < 2; ++k) {
        uint32_t parts[kScopeParts];
        split<half_t>(cell[2 * k], cell[2 * k + 1], parts);
        DK_UNROLL
        for (int i = 0; i < kScopeParts; ++i) part[j][i][k] = parts[i];
      }
    }
  }
};

}  // namespace cuda
}  // namespace dk

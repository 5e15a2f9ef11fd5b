// The depthwise kernels, in GCC/Clang vector extensions. Included once per instruction set by a
// file that defines DK_ISA (a namespace) and DK_VECTOR_BYTES and sets the target. Nothing here may
// instantiate templates of other headers out of line: the linker would keep one copy for all
// targets.
//
// Work goes by tiles of pixels in a row. For each tap, the bilinear coefficients of a tile are
// computed once, vectorised over pixels, and shared by all channels; then each pixel runs over its
// channels in groups of up to kGroup vectors. A block of channels is done for the whole tile before
// the next, so that its scope (S_h*S_w*kChannelBlock values, next to each other: at the distance of
// all channels, often a power of two, they would evict each other) stays in the first-level cache.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../bilinear.h"  // for the target: nothing of it is compiled out of line
#include "depthwise.h"

namespace dk {
namespace DK_ISA {

constexpr int kTile = 16;
// Vectors per group, as many as the registers hold.
constexpr int kGroup = DK_VECTOR_BYTES == 64 ? 8 : 4;

// ---- vectors -----------------------------------------------------------------------------------

template <typename T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <typename T>
using Vector = typename VectorOf<T, DK_VECTOR_BYTES>::type;

// Number of elements of V, which is a vector or, for the last few channels, a scalar.
template <typename V, typename T>
constexpr int lanes = sizeof(V) / sizeof(T);

template <typename V, typename T>
DK_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
DK_INLINE void store(T* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// GCC reads a value that is used twice from memory twice, where loads are what limits the loop.
template <typename V>
DK_INLINE void keep_in_register(V& v) {
#if DK_VECTOR_BYTES > 16
  if constexpr (sizeof(V) == DK_VECTOR_BYTES) asm("" : "+v"(v));
#endif
}

template <typename V>
DK_INLINE V load(const c10::BFloat16* p) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*p);
  } else {
    typename VectorOf<uint16_t, sizeof(V) / 2>::type bits;
    std::memcpy(&bits, p, sizeof(bits));
    return (V)(__builtin_convertvector(bits, typename VectorOf<uint32_t, sizeof(V)>::type) << 16);
  }
}

// Round to nearest even; a NaN stays one.
template <typename V>
DK_INLINE void store(c10::BFloat16* p, const V& v) {
  if constexpr (std::is_same_v<V, float>) {
    *p = v;
  } else {
    typedef typename VectorOf<uint32_t, sizeof(V)>::type bits_t;
    const bits_t bits = (bits_t)v;
    const bits_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bits_t is_nan = (bits_t)(v != v);
    const bits_t kept = (rounded & ~is_nan) | (0x7fc0 & is_nan);
    const auto narrow =
        __builtin_convertvector(kept, typename VectorOf<uint16_t, sizeof(V) / 2>::type);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
}

template <typename V>
DK_INLINE V load(const c10::Half* p) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*p);
  } else {
#if DK_VECTOR_BYTES == 64
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif DK_VECTOR_BYTES == 32
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    V v;
    for (int i = 0; i < lanes<V, float>; ++i) v[i] = static_cast<float>(p[i]);
    return v;
#endif
  }
}

template <typename V>
DK_INLINE void store(c10::Half* p, const V& v) {
  if constexpr (std::is_same_v<V, float>) {
    *p = v;
  } else {
#if DK_VECTOR_BYTES == 64
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif DK_VECTOR_BYTES == 32
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < lanes<V, float>; ++i) p[i] = v[i];
#endif
  }
}

// As many elements of type E as a vector of T has.
template <typename E, typename T>
using Like = typename VectorOf<E, lanes<Vector<T>, T> * sizeof(E)>::type;

// A row of channels to the storage type.
template <typename T, typename scalar_t>
DK_INLINE void convert(const T* from, scalar_t* to, int64_t count) {
  typedef Vector<T> V;
  int64_t c = 0;
  for (; c + lanes<V, T> <= count; c += lanes<V, T>) store(to + c, load<V>(from + c));
  for (; c < count; ++c) store(to + c, from[c]);
}

#if defined(__clang__)
#define DK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DK_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, typename VectorOf<Integer, sizeof(V)>::type{__VA_ARGS__})
#endif

// The sums of four vectors, or of four single numbers.
template <typename T, typename V>
DK_INLINE void sum_each(const V (&v)[4], T* sums) {
  if constexpr (sizeof(V) == sizeof(T)) {
    std::memcpy(sums, v, sizeof(v));
  } else if constexpr (lanes<V, T> == 4) {
    using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    // Sums of pairs of v[0] and v[1], then of v[2] and v[3]; a sum of each in turn.
    const V a = DK_SHUFFLE(v[0], v[1], 0, 4, 1, 5) + DK_SHUFFLE(v[0], v[1], 2, 6, 3, 7);
    const V b = DK_SHUFFLE(v[2], v[3], 0, 4, 1, 5) + DK_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
    store(sums, DK_SHUFFLE(a, b, 0, 1, 4, 5) + DK_SHUFFLE(a, b, 2, 3, 6, 7));
  } else {
    typename VectorOf<T, sizeof(V) / 2>::type halves[2], sum[4];
    for (int j = 0; j < 4; ++j) {
      std::memcpy(halves, &v[j], sizeof(V));
      sum[j] = halves[0] + halves[1];
    }
    sum_each<T>(sum, sums);
  }
}

}  // namespace DK_ISA

// What bilinear.h asks of a vector.
template <typename V, typename T, typename I>
struct VectorNumbers {
  using element = T;
  using integer = I;
  static DK_INLINE I truncate(const V& x) { return __builtin_convertvector(x, I); }
  static DK_INLINE V convert(const I& i) { return __builtin_convertvector(i, V); }
};
template <>
struct Numbers<DK_ISA::Vector<float>>
    : VectorNumbers<DK_ISA::Vector<float>, float, DK_ISA::Vector<int32_t>> {};
template <>
struct Numbers<DK_ISA::Vector<double>>
    : VectorNumbers<DK_ISA::Vector<double>, double, DK_ISA::Vector<int64_t>> {};

namespace DK_ISA {

// ---- taps of a tile ----------------------------------------------------------------------------

// Where one tap of each pixel of a tile reads its four cells: element offsets, coefficients, and
// their derivatives by the location.
template <typename T, typename index_t>
struct TapTile {
  index_t cell[4][kTile];
  T coef[4][kTile];
  T grad_h[4][kTile];
  T grad_w[4][kTile];

  // Pixels i ... of the tile; cells lie `step` elements apart, rows of `width` cells.
  DK_INLINE void set(int i, const AxisSample<Vector<T>>& h, const AxisSample<Vector<T>>& w,
                     index_t width, index_t step) {
    typedef Like<index_t, T> I;
    for (int j = 0; j < 4; ++j) {
      const I row = __builtin_convertvector(h.cell[j / 2], I);
      const I column = __builtin_convertvector(w.cell[j % 2], I);
      store(cell[j] + i, (row * width + column) * step);
      store(coef[j] + i, h.coef[j / 2] * w.coef[j % 2]);
      store(grad_h[j] + i, h.grad[j / 2] * w.coef[j % 2]);
      store(grad_w[j] + i, h.coef[j / 2] * w.grad[j % 2]);
    }
  }
};

template <typename T>
using ScopeTile = TapTile<T, int>;
template <typename T>
using ImageTile = TapTile<T, int64_t>;

// Per-call scratch: one Tile per tap.
template <typename Tile>
struct Scratch {
  explicit Scratch(int taps) : tiles(static_cast<Tile*>(std::malloc(sizeof(Tile) * taps))) {
    if (!tiles) std::abort();
  }
  ~Scratch() { std::free(tiles); }
  Scratch(const Scratch&) = delete;
  Tile* tiles;
};

// Offsets of tap t at the output pixels (row, column[i]); pixels without one (column < 0) get those
// of column 0.
template <typename T>
DK_INLINE void gather_offset(const Offset<const T>& offset, int64_t n, int t, int64_t row,
                             const int64_t* column, T* h, T* w) {
  const OffsetStrides s = offset.strides;
  const T* base = offset.data + n * s.n + 2 * t * s.c + row * s.h;
  for (int i = 0; i < kTile; ++i) {
    const T* pixel = base + (column[i] < 0 ? 0 : column[i]) * s.w;
    h[i] = pixel[0];
    w[i] = pixel[s.c];
  }
}

// Their locations in the scope.
template <typename T>
DK_INLINE void locate_in_scope(const DepthwiseParams& p, const Offset<const T>& offset, int64_t n,
                               int t, int64_t row, const int64_t* column, T* h, T* w) {
  gather_offset(offset, n, t, row, column, h, w);
  const T rest_h = T(p.scope_h - p.kernel_h) / 2 + T(t / p.kernel_w);
  const T rest_w = T(p.scope_w - p.kernel_w) / 2 + T(t % p.kernel_w);
  for (int i = 0; i < kTile; ++i) {
    h[i] += rest_h;
    w[i] += rest_w;
  }
}

template <typename T>
DK_INLINE void fill_scope_tile(const DepthwiseParams& p, const Offset<const T>& offset, int64_t n,
                               int t, int64_t row, const int64_t* column, ScopeTile<T>& tile) {
  typedef Vector<T> V;
  T h[kTile], w[kTile];
  locate_in_scope(p, offset, n, t, row, column, h, w);
  for (int i = 0; i < kTile; i += lanes<V, T>) {
    tile.set(i, sample_scope(load<V>(h + i), p.scope_h, p.clip),
             sample_scope(load<V>(w + i), p.scope_w, p.clip), p.scope_w, kChannelBlock);
  }
}

template <typename T>
DK_INLINE void fill_image_tile(const DepthwiseParams& p, const Offset<const T>& offset, int64_t n,
                               int t, int64_t row, const int64_t* column, ImageTile<T>& tile) {
  typedef Vector<T> V;
  T h[kTile], w[kTile];
  gather_offset(offset, n, t, row, column, h, w);
  const T y = T(row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h);
  for (int i = 0; i < kTile; ++i)
    w[i] += T(column[i] * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w);
  for (int i = 0; i < kTile; i += lanes<V, T>) {
    tile.set(i, sample_image(y + load<V>(h + i), static_cast<int>(p.in_h)),
             sample_image(load<V>(w + i), static_cast<int>(p.in_w)), p.in_w, p.channels);
  }
}

// Columns begin .. begin + count of an output row, the rest of the tile marked as absent.
DK_INLINE void output_columns(int64_t begin, int count, int64_t* column) {
  for (int i = 0; i < kTile; ++i) column[i] = i < count ? begin + i : -1;
}

// ---- channels of a block -----------------------------------------------------------------------
//
// Pointers are to the first channel of the block, c counts from there.

// Calls body.run<V, U>(c) over [begin, end): groups of U vectors, then U/2 ..., then single
// channels.
template <typename T, int U, typename Body>
DK_INLINE void for_channels(int64_t begin, int64_t end, const Body& body) {
  typedef Vector<T> V;
  int64_t c = begin;
  for (; c + U * lanes<V, T> <= end; c += U * lanes<V, T>) body.template run<V, U>(c);
  if constexpr (U > 1) {
    for_channels<T, U / 2>(c, end, body);
  } else {
    for (; c < end; ++c) body.template run<T, 1>(c);
  }
}

// Channels in the block that begins at channel c.
DK_INLINE int64_t block_width(const DepthwiseParams& p, int64_t c) {
  return p.channels - c < kChannelBlock ? p.channels - c : kChannelBlock;
}

// The four cells of a tap of one pixel.
template <typename V, typename T, typename index_t>
struct Cells {
  V coef[4];
  index_t cell[4];

  DK_INLINE Cells(const TapTile<T, index_t>& tile, int i) {
    for (int j = 0; j < 4; ++j) {
      coef[j] = V{} + tile.coef[j][i];
      cell[j] = tile.cell[j][i];
    }
  }
  template <typename scalar_t>
  DK_INLINE V value(const scalar_t* values, int j) const {
    return load<V>(values + cell[j]);
  }
  // Σ_j coef[j] * value(j): one bilinear sample.
  template <typename scalar_t>
  DK_INLINE V operator()(const scalar_t* values) const {
    V v = coef[0] * value(values, 0);
    for (int j = 1; j < 4; ++j) v += coef[j] * value(values, j);
    return v;
  }
};

// The rigid counterpart of Cells: one cell, as it is.
template <typename V>
struct Cell {
  int64_t cell;

  template <typename scalar_t>
  DK_INLINE V operator()(const scalar_t* values) const {
    return load<V>(values + cell);
  }
};

// Has a block of channels in the cache by the time that its tile is next: the tiles' jumps defeat
// the processor's own guesses. A prefetch past the end of a tensor does nothing.
template <bool kWrite, typename scalar_t>
DK_INLINE void prefetch(const scalar_t* block) {
  for (size_t byte = 0; byte < kChannelBlock * sizeof(scalar_t); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(block) + byte, kWrite);
}

// How tap t of pixel i of a tile reads the scope: sampled or, without kernel offsets, its own cell.
template <typename V, bool kKernel, typename T>
DK_INLINE auto scope_sampler(const ScopeTile<T>* scope, int t, int i) {
  if constexpr (kKernel)
    return Cells<V, T, int>(scope[t], i);
  else
    return Cell<V>{t * kChannelBlock};
}

// *p += v, a vector.
template <typename V, typename T>
DK_INLINE void add_to(T* p, const V& v) {
  store(p, load<V>(p) + v);
}

// The rigid data grid: which input pixel a tap of each output pixel reads (or, backward, which
// output pixel it feeds), as an element offset; -1 for none.
struct PixelTile {
  int64_t offset[kTile];
};

// ---- forward -----------------------------------------------------------------------------------

DK_INLINE void fill_pixel_tile(const DepthwiseParams& p, int t, int64_t row, const int64_t* column,
                               PixelTile& tile) {
  const int64_t y = row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h;
  for (int i = 0; i < kTile; ++i) {
    const int64_t x = column[i] * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w;
    const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
    tile.offset[i] = inside ? (y * p.in_w + x) * p.channels : -1;
  }
}

// One output pixel, a block of channels.
template <typename scalar_t, bool kKernel, bool kData>
struct ForwardPixel {
  using T = opmath_t<scalar_t>;
  int taps;
  const ScopeTile<T>* scope;  // per tap, if kKernel
  const ImageTile<T>* image;  // per tap, if kData
  const PixelTile* pixels;    // per tap, if not kData
  const T* weight;
  const T* bias;          // null: none
  const scalar_t* input;  // of the image
  scalar_t* output;       // of the pixel
  int i;                  // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V acc[U];
    for (int u = 0; u < U; ++u) acc[u] = bias ? load<V>(bias + c + u * L) : V{};
    for (int t = 0; t < taps; ++t) {
      if constexpr (!kData) {
        if (pixels[t].offset[i] < 0) {
          add_padding(t, acc, U);
          continue;
        }
      }
      const auto sample_weight = scope_sampler<V, kKernel>(scope, t, i);
      const auto sample_value = value_sampler<V>(t);
      const T* w = weight + c;
      const scalar_t* x = input + c;
      for (int u = 0; u < U; ++u) acc[u] += sample_weight(w + u * L) * sample_value(x + u * L);
    }
    for (int u = 0; u < U; ++u) store(output + c + u * L, acc[u]);
  }

  // A tap in the padding adds 0, but a NaN of its offset still shows in the output.
  template <typename V>
  DK_INLINE void add_padding(int t, V* acc, int count) const {
    if constexpr (kKernel) {
      const T coef = scope[t].coef[0][i];
      if (coef == coef) return;
      for (int u = 0; u < count; ++u) acc[u] += coef;
    }
  }

  template <typename V>
  DK_INLINE auto value_sampler(int t) const {
    if constexpr (kData)
      return Cells<V, T, int64_t>(image[t], i);
    else
      return Cell<V>{pixels[t].offset[i]};
  }
};

template <bool kKernel, bool kData, typename scalar_t>
DK_INLINE void forward_rows(const DepthwiseForward<scalar_t>& a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(kData ? taps : 1);
  Scratch<PixelTile> pixels(kData ? 1 : taps);
  int64_t column[kTile];
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / p.out_h, row = line % p.out_h;
    const scalar_t* input = a.input + n * p.in_h * p.in_w * p.channels;
    for (int64_t x = 0; x < p.out_w; x += kTile) {
      const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
      output_columns(x, count, column);
      for (int t = 0; t < taps; ++t) {
        if constexpr (kKernel)
          fill_scope_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
        if constexpr (kData)
          fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
        else
          fill_pixel_tile(p, t, row, column, pixels.tiles[t]);
      }
      for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
        for (int i = 0; i < count; ++i) {
          const ForwardPixel<scalar_t, kKernel, kData> pixel{
              taps,
              scope.tiles,
              image.tiles,
              pixels.tiles,
              a.weight + c * p.cells(),
              a.bias ? a.bias + c : nullptr,
              input + c,
              a.output + (line * p.out_w + x + i) * p.channels + c,
              i};
          for_channels<T, kGroup>(0, block_width(p, c), pixel);
          // The last tap's row is the one that the rows above have not read.
          if constexpr (!kData)
            prefetch<false>(input + pixels.tiles[taps - 1].offset[i] + kTile * p.channels + c);
          prefetch<true>(pixel.output + kTile * p.channels);
        }
      }
    }
  }
}

template <typename scalar_t>
void forward(const DepthwiseForward<scalar_t>& a, int64_t begin, int64_t end) {
  const bool kernel = a.kernel_offset.data, data = a.data_offset.data;
  if (kernel && data)
    forward_rows<true, true>(a, begin, end);
  else if (kernel)
    forward_rows<true, false>(a, begin, end);
  else if (data)
    forward_rows<false, true>(a, begin, end);
  else
    forward_rows<false, false>(a, begin, end);
}

// ---- gradients of offsets ----------------------------------------------------------------------

// For one tap of each pixel of a tile and each of its four cells: Σ over channels of the cell's
// value times what it is multiplied with.
template <typename T>
struct DotTile {
  T dot[kTile][4];
};

template <typename T>
DK_INLINE void clear(DotTile<T>* tiles, int count) {
  std::memset(tiles, 0, sizeof(DotTile<T>) * count);
}

// Gradients of a tap's row and column at each pixel of its tile.
template <typename T, typename index_t>
DK_INLINE void offset_gradient(const TapTile<T, index_t>& tile, const DotTile<T>& dots, T* h,
                               T* w) {
  for (int i = 0; i < kTile; ++i) {
    h[i] = w[i] = 0;
    for (int j = 0; j < 4; ++j) {
      h[i] += tile.grad_h[j][i] * dots.dot[i][j];
      w[i] += tile.grad_w[j][i] * dots.dot[i][j];
    }
  }
}

// The counterpart of gather_offset.
template <typename T>
DK_INLINE void scatter_offset(const Offset<T>& offset, int64_t n, int t, int64_t row,
                              const int64_t* column, const T* h, const T* w) {
  const OffsetStrides s = offset.strides;
  T* base = offset.data + n * s.n + 2 * t * s.c + row * s.h;
  for (int i = 0; i < kTile; ++i) {
    if (column[i] < 0) continue;
    base[column[i] * s.w] = h[i];
    base[column[i] * s.w + s.c] = w[i];
  }
}

template <typename scalar_t, typename T>
DK_INLINE void store_data_offset_gradient(const DepthwiseBackward<scalar_t>& a, int64_t n, int t,
                                          int64_t row, const int64_t* column,
                                          const ImageTile<T>& tile, const DotTile<T>& dots) {
  T h[kTile], w[kTile];
  offset_gradient(tile, dots, h, w);
  scatter_offset(a.grad_data_offset, n, t, row, column, h, w);
}

template <typename scalar_t, typename T>
DK_INLINE void store_kernel_offset_gradient(const DepthwiseBackward<scalar_t>& a, int64_t n, int t,
                                            int64_t row, const int64_t* column,
                                            const ScopeTile<T>& tile, const DotTile<T>& dots) {
  const DepthwiseParams& p = a.params;
  T h[kTile], w[kTile];
  offset_gradient(tile, dots, h, w);
  if (p.clip) {
    T y[kTile], x[kTile];
    locate_in_scope(p, a.kernel_offset, n, t, row, column, y, x);
    for (int i = 0; i < kTile; ++i) {
      h[i] = inward(y[i], p.scope_h, h[i]);
      w[i] = inward(x[i], p.scope_w, w[i]);
    }
  }
  scatter_offset(a.grad_kernel_offset, n, t, row, column, h, w);
}

// Over a block of channels, vectors and then single ones, calls body.run(c, cells, dots), which
// adds to the dots. `cells` is body.cells(), made once. The sums are added to pixel i of the tiles.
template <typename T, int kTiles, typename Body>
DK_INLINE void sum_channels(int64_t width, const Body& body, DotTile<T>* const (&tiles)[kTiles],
                            int i) {
  typedef Vector<T> V;
  V vectors[kTiles][4] = {};
  T singles[kTiles][4] = {};
  int64_t c = 0;
  const auto vector_cells = body.template cells<V>();
  for (; c + lanes<V, T> <= width; c += lanes<V, T>) body.run(c, vector_cells, vectors);
  if (c < width) {
    const auto cells = body.template cells<T>();
    for (; c < width; ++c) body.run(c, cells, singles);
  }
  for (int k = 0; k < kTiles; ++k) {
    if (!tiles[k]) continue;
    T sums[4];
    sum_each<T>(vectors[k], sums);
    for (int j = 0; j < 4; ++j) tiles[k]->dot[i][j] += sums[j] + singles[k][j];
  }
}

// ---- backward, rigid data grid -----------------------------------------------------------------
//
// By input pixels: pixel q and tap t meet in the one output p = (q + pad - k_t * dilation) /
// stride, if that is on the stride grid. Every (p, t) is visited once, so x and grad_output are
// read once, grad_input and grad_kernel_offset are written once, and nothing is scattered.

// The output row (column) that reads an input row (column) through a tap, -1 for none.
DK_INLINE int64_t fed_output(int64_t in, int64_t pad, int64_t tap, int64_t dilation, int64_t stride,
                             int64_t size) {
  const int64_t position = in + pad - tap * dilation;
  if (position < 0 || position % stride) return -1;
  return position / stride < size ? position / stride : -1;
}

// One tap of one input pixel.
template <typename scalar_t, bool kKernel>
struct BackwardTap {
  using T = opmath_t<scalar_t>;
  const ScopeTile<T>& scope;  // if kKernel
  int i;                      // the pixel in its tile
  const T* weight;            // if not kKernel, of the tap
  const scalar_t* input;
  const scalar_t* grad_output;
  T* grad_input;
  T* grad_weight;  // like weight

  template <typename V>
  DK_INLINE auto cells() const {
    if constexpr (kKernel)
      return Cells<V, T, int>(scope, i);
    else
      return 0;
  }

  template <typename V, typename Scope>
  DK_INLINE void run(int64_t c, const Scope& cells, V (&dots)[1][4]) const {
    const V g = load<V>(grad_output + c);
    const V gx = g * load<V>(input + c);
    if constexpr (kKernel) {
      V sample{};
      for (int j = 0; j < 4; ++j) {
        V w = cells.value(weight + c, j);
        keep_in_register(w);
        sample += cells.coef[j] * w;
        dots[0][j] += gx * w;
        add_to<V>(grad_weight + cells.cell[j] + c, cells.coef[j] * gx);
      }
      add_to<V>(grad_input + c, g * sample);
    } else {
      add_to<V>(grad_weight + c, gx);
      add_to<V>(grad_input + c, g * load<V>(weight + c));
    }
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_rows(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,
                             opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<DotTile<T>> dots(kKernel ? taps : 1);
  Scratch<PixelTile> pixels(taps);
  Scratch<int64_t[kTile]> column(taps);
  Scratch<int64_t> row(taps);
  alignas(64) T grad_pixel[kChannelBlock];
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / p.in_h, y = line % p.in_h;
    const scalar_t* grad_output = a.grad_output + n * p.out_h * p.out_w * p.channels;
    for (int64_t x = 0; x < p.in_w; x += kTile) {
      const int count = static_cast<int>(p.in_w - x < kTile ? p.in_w - x : kTile);
      for (int t = 0; t < taps; ++t) {
        row.tiles[t] = fed_output(y, p.pad_h, t / p.kernel_w, p.dilation_h, p.stride_h, p.out_h);
        for (int i = 0; i < kTile; ++i) {
          const int64_t col =
              i < count && row.tiles[t] >= 0
                  ? fed_output(x + i, p.pad_w, t % p.kernel_w, p.dilation_w, p.stride_w, p.out_w)
                  : -1;
          column.tiles[t][i] = col;
          pixels.tiles[t].offset[i] = col < 0 ? -1 : (row.tiles[t] * p.out_w + col) * p.channels;
        }
        if (kKernel && row.tiles[t] >= 0) {
          fill_scope_tile(p, a.kernel_offset, n, t, row.tiles[t], column.tiles[t], scope.tiles[t]);
        }
      }
      if constexpr (kKernel) clear(dots.tiles, taps);
      for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
        const int64_t width = block_width(p, c);
        for (int i = 0; i < count; ++i) {
          const int64_t pixel = (line * p.in_w + x + i) * p.channels + c;
          std::memset(grad_pixel, 0, sizeof(T) * width);
          for (int t = 0; t < taps; ++t) {
            if (pixels.tiles[t].offset[i] < 0) continue;
            const int64_t block = c * p.cells() + (kKernel ? 0 : t * kChannelBlock);
            const BackwardTap<scalar_t, kKernel> tap{scope.tiles[kKernel ? t : 0],
                                                     i,
                                                     a.weight + block,
                                                     a.input + pixel,
                                                     grad_output + pixels.tiles[t].offset[i] + c,
                                                     grad_pixel,
                                                     grad_weight + block};
            sum_channels<T, 1>(width, tap, {kKernel ? &dots.tiles[t] : nullptr}, i);
          }
          convert(grad_pixel, grad_input + pixel, width);
          // The first tap's row is the one that the rows above have not read.
          prefetch<false>(grad_output + pixels.tiles[0].offset[i] + kTile * p.channels + c);
          prefetch<false>(a.input + pixel + kTile * p.channels);
          prefetch<true>(grad_input + pixel + kTile * p.channels);
        }
      }
      if constexpr (kKernel) {
        for (int t = 0; t < taps; ++t) {
          if (row.tiles[t] < 0) continue;
          store_kernel_offset_gradient(a, n, t, row.tiles[t], column.tiles[t], scope.tiles[t],
                                       dots.tiles[t]);
        }
      }
    }
  }
}

template <typename scalar_t>
void backward(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,
              opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end) {
  if (a.kernel_offset.data)
    backward_rows<true>(a, grad_input, grad_weight, begin, end);
  else
    backward_rows<false>(a, grad_input, grad_weight, begin, end);
}

// ---- backward, deformed data grid --------------------------------------------------------------

// One tap of one output pixel: gradients of weight and offsets. dots[0]: of the data, [1]: of the
// kernel.
template <typename scalar_t, bool kKernel>
struct BackwardDataOffsetTap {
  using T = opmath_t<scalar_t>;
  const ScopeTile<T>& scope;  // if kKernel
  const ImageTile<T>& image;
  int i;                  // the pixel in its tile
  const T* weight;        // if not kKernel, of the tap
  const scalar_t* input;  // of the image
  const scalar_t* grad_output;
  T* grad_weight;  // like weight

  template <typename V>
  DK_INLINE auto cells() const {
    if constexpr (kKernel)
      return std::make_pair(Cells<V, T, int64_t>(image, i), Cells<V, T, int>(scope, i));
    else
      return std::make_pair(Cells<V, T, int64_t>(image, i), 0);
  }

  template <typename V, typename Pair>
  DK_INLINE void run(int64_t c, const Pair& cells, V (&dots)[2][4]) const {
    const auto& data = cells.first;
    const V g = load<V>(grad_output + c);
    const V gx = g * data(input + c);
    V sample{};
    if constexpr (kKernel) {
      for (int j = 0; j < 4; ++j) {
        V w = cells.second.value(weight + c, j);
        keep_in_register(w);
        sample += cells.second.coef[j] * w;
        dots[1][j] += gx * w;
        add_to<V>(grad_weight + cells.second.cell[j] + c, cells.second.coef[j] * gx);
      }
    } else {
      sample = load<V>(weight + c);
      add_to<V>(grad_weight + c, gx);
    }
    const V gw = g * sample;
    for (int j = 0; j < 4; ++j) dots[0][j] += gw * data.value(input + c, j);
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_data_offset_rows(const DepthwiseBackward<scalar_t>& a,
                                         opmath_t<scalar_t>* grad_weight, int64_t begin,
                                         int64_t end) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(taps);
  Scratch<DotTile<T>> kernel_dots(kKernel ? taps : 1), data_dots(taps);
  int64_t column[kTile];
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / p.out_h, row = line % p.out_h;
    const scalar_t* input = a.input + n * p.in_h * p.in_w * p.channels;
    for (int64_t x = 0; x < p.out_w; x += kTile) {
      const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
      output_columns(x, count, column);
      for (int t = 0; t < taps; ++t) {
        fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
        if constexpr (kKernel)
          fill_scope_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
      }
      clear(data_dots.tiles, taps);
      if constexpr (kKernel) clear(kernel_dots.tiles, taps);
      for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
        const int64_t width = block_width(p, c);
        for (int i = 0; i < count; ++i) {
          for (int t = 0; t < taps; ++t) {
            const int64_t block = c * p.cells() + (kKernel ? 0 : t * kChannelBlock);
            const BackwardDataOffsetTap<scalar_t, kKernel> tap{
                scope.tiles[kKernel ? t : 0],
                image.tiles[t],
                i,
                a.weight + block,
                input + c,
                a.grad_output + (line * p.out_w + x + i) * p.channels + c,
                grad_weight + block};
            sum_channels<T, 2>(width, tap,
                               {&data_dots.tiles[t], kKernel ? &kernel_dots.tiles[t] : nullptr}, i);
          }
        }
      }
      for (int t = 0; t < taps; ++t) {
        store_data_offset_gradient(a, n, t, row, column, image.tiles[t], data_dots.tiles[t]);
        if constexpr (kKernel)
          store_kernel_offset_gradient(a, n, t, row, column, scope.tiles[t], kernel_dots.tiles[t]);
      }
    }
  }
}

template <typename scalar_t>
void backward_data_offset(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_weight,
                          int64_t begin, int64_t end) {
  if (a.kernel_offset.data)
    backward_data_offset_rows<true>(a, grad_weight, begin, end);
  else
    backward_data_offset_rows<false>(a, grad_weight, begin, end);
}

// One output pixel: gradient of the input, scattered to the four pixels of each tap.
template <typename scalar_t, bool kKernel>
struct BackwardDataPixel {
  using T = opmath_t<scalar_t>;
  int taps;
  const ScopeTile<T>* scope;  // per tap, if kKernel
  const ImageTile<T>* image;  // per tap
  const T* weight;
  const scalar_t* grad_output;
  T* grad_input;  // of the image
  int i;          // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V g[U];
    for (int u = 0; u < U; ++u) g[u] = load<V>(grad_output + c + u * L);
    for (int t = 0; t < taps; ++t) {
      const auto sample_weight = scope_sampler<V, kKernel>(scope, t, i);
      const Cells<V, T, int64_t> data(image[t], i);
      for (int u = 0; u < U; ++u) {
        const V grad = g[u] * sample_weight(weight + c + u * L);
        for (int j = 0; j < 4; ++j) {
          if (image[t].coef[j][i] == T(0)) continue;  // outside the image: its cell is not its own
          add_to<V>(grad_input + data.cell[j] + c + u * L, data.coef[j] * grad);
        }
      }
    }
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_data_block(const DepthwiseBackward<scalar_t>& a,
                                   opmath_t<scalar_t>* grad_input, int64_t n, int64_t block) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(taps);
  int64_t column[kTile];
  const int64_t c = block * kChannelBlock;
  for (int64_t row = 0; row < p.out_h; ++row) {
    for (int64_t x = 0; x < p.out_w; x += kTile) {
      const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
      output_columns(x, count, column);
      for (int t = 0; t < taps; ++t) {
        fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
        if constexpr (kKernel)
          fill_scope_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
      }
      for (int i = 0; i < count; ++i) {
        const BackwardDataPixel<scalar_t, kKernel> pixel{
            taps,
            scope.tiles,
            image.tiles,
            a.weight + c * p.cells(),
            a.grad_output + ((n * p.out_h + row) * p.out_w + x + i) * p.channels + c,
            grad_input + n * p.in_h * p.in_w * p.channels + c,
            i};
        for_channels<T, kGroup>(0, block_width(p, c), pixel);
      }
    }
  }
}

template <typename scalar_t>
void backward_data(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input, int64_t n,
                   int64_t block) {
  if (a.kernel_offset.data)
    backward_data_block<true>(a, grad_input, n, block);
  else
    backward_data_block<false>(a, grad_input, n, block);
}

#define DK_INSTANTIATE(scalar_t)                                                                \
  template void forward(const DepthwiseForward<scalar_t>&, int64_t, int64_t);                   \
  template void backward(const DepthwiseBackward<scalar_t>&, scalar_t*, opmath_t<scalar_t>*,    \
                         int64_t, int64_t);                                                     \
  template void backward_data_offset(const DepthwiseBackward<scalar_t>&, opmath_t<scalar_t>*,   \
                                     int64_t, int64_t);                                         \
  template void backward_data(const DepthwiseBackward<scalar_t>&, opmath_t<scalar_t>*, int64_t, \
                              int64_t);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)
DK_INSTANTIATE(c10::Half)
DK_INSTANTIATE(c10::BFloat16)
#undef DK_INSTANTIATE

}  // namespace DK_ISA
}  // namespace dk

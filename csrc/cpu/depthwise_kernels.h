// The depthwise kernels, in GCC/Clang vector extensions. Included once per instruction set by a
// file that defines DK_ISA (a namespace) and DK_VECTOR_BYTES and sets the target. Nothing here may
// instantiate templates of other headers out of line: the linker would keep one copy for all
// targets.
//
// Work goes by tiles of pixels in a row. For each tap, the bilinear coefficients of a tile are
// computed once, vectorised over pixels, and shared by all channels; then each pixel runs over its
// channels in groups of up to kGroup vectors. A block of channels is done for the whole tile before
// the next, so that its scope (S_h*S_w*kChannelBlock values) stays in the first-level cache.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../bilinear.h"
#include "depthwise.h"

namespace dk {
namespace DK_ISA {

constexpr int kTile = 16;
constexpr int64_t kChannelBlock = 128;
// Vectors per group, as many as the registers hold.
constexpr int kGroup = DK_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kBackwardGroup = DK_VECTOR_BYTES == 64 ? 4 : 2;

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

template <typename T, typename V>
DK_INLINE T sum(const V& v) {
  if constexpr (sizeof(V) == sizeof(T)) {
    T s;
    std::memcpy(&s, &v, sizeof(T));
    return s;
  } else {
    typedef typename VectorOf<T, sizeof(V) / 2>::type half_t;
    half_t halves[2];
    std::memcpy(halves, &v, sizeof(V));
    return sum<T>(halves[0] + halves[1]);
  }
}

// ---- taps of a tile ----------------------------------------------------------------------------

// Where one tap of each pixel of a tile reads its four cells: element offsets (the cell times the
// number of channels), coefficients, and their derivatives by the location.
template <typename T, typename index_t>
struct TapTile {
  index_t cell[4][kTile];
  T coef[4][kTile];
  T grad_h[4][kTile];
  T grad_w[4][kTile];

  DK_INLINE void set(int i, const AxisSample<T>& h, const AxisSample<T>& w, int width,
                     int64_t channels) {
    for (int j = 0; j < 4; ++j) {
      cell[j][i] = static_cast<index_t>(h.cell[j / 2] * index_t(width) + w.cell[j % 2]) *
                   static_cast<index_t>(channels);
      coef[j][i] = h.coef[j / 2] * w.coef[j % 2];
      grad_h[j][i] = h.grad[j / 2] * w.coef[j % 2];
      grad_w[j][i] = h.coef[j / 2] * w.grad[j % 2];
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

// Offsets of tap t at the output pixels (row, column[i]); pixels without one (column < 0) get zero.
template <typename T>
DK_INLINE void gather_offset(const Offset<const T>& offset, int64_t n, int t, int64_t row,
                             const int64_t* column, T* h, T* w) {
  const OffsetStrides s = offset.strides;
  const T* base = offset.data + n * s.n + 2 * t * s.c + row * s.h;
  for (int i = 0; i < kTile; ++i) {
    h[i] = column[i] < 0 ? T(0) : base[column[i] * s.w];
    w[i] = column[i] < 0 ? T(0) : base[column[i] * s.w + s.c];
  }
}

template <typename T>
DK_INLINE void fill_scope_tile(const DepthwiseParams& p, const Offset<const T>& offset, int64_t n,
                               int t, int64_t row, const int64_t* column, ScopeTile<T>& tile) {
  T h[kTile], w[kTile];
  gather_offset(offset, n, t, row, column, h, w);
  const T rest_h = T(p.scope_h - p.kernel_h) / 2 + T(t / p.kernel_w);
  const T rest_w = T(p.scope_w - p.kernel_w) / 2 + T(t % p.kernel_w);
  for (int i = 0; i < kTile; ++i) {
    tile.set(i, sample_scope(rest_h + h[i], p.scope_h, p.clip),
             sample_scope(rest_w + w[i], p.scope_w, p.clip), p.scope_w, p.channels);
  }
}

template <typename T>
DK_INLINE void fill_image_tile(const DepthwiseParams& p, const Offset<const T>& offset, int64_t n,
                               int t, int64_t row, const int64_t* column, ImageTile<T>& tile) {
  T h[kTile], w[kTile];
  gather_offset(offset, n, t, row, column, h, w);
  const int64_t y = row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h;
  for (int i = 0; i < kTile; ++i) {
    const int64_t x = column[i] * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w;
    tile.set(i, sample_image(T(y) + h[i], static_cast<int>(p.in_h)),
             sample_image(T(x) + w[i], static_cast<int>(p.in_w)), static_cast<int>(p.in_w),
             p.channels);
  }
}

// Columns begin .. begin + count of an output row, the rest of the tile marked as absent.
DK_INLINE void output_columns(int64_t begin, int count, int64_t* column) {
  for (int i = 0; i < kTile; ++i) column[i] = i < count ? begin + i : -1;
}

// ---- channel groups ----------------------------------------------------------------------------

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

// Σ_j coef[j] * values[cell[j] + c]: one bilinear sample of a vector of channels.
template <typename V, typename T, typename scalar_t, typename index_t>
DK_INLINE V interpolate(const TapTile<T, index_t>& tile, int i, const scalar_t* values) {
  V v = tile.coef[0][i] * load<V>(values + tile.cell[0][i]);
  for (int j = 1; j < 4; ++j) v += tile.coef[j][i] * load<V>(values + tile.cell[j][i]);
  return v;
}

// Adds the gradient of a tap's offset, given for each cell Σ over channels of (its value * what it
// is multiplied with).
template <typename T, typename index_t, typename V>
DK_INLINE void add_offset_gradient(const TapTile<T, index_t>& tile, int i, const V* dot,
                                   T (*grad)[kTile]) {
  V h = tile.grad_h[0][i] * dot[0], w = tile.grad_w[0][i] * dot[0];
  for (int j = 1; j < 4; ++j) {
    h += tile.grad_h[j][i] * dot[j];
    w += tile.grad_w[j][i] * dot[j];
  }
  grad[0][i] += sum<T>(h);
  grad[1][i] += sum<T>(w);
}

// The counterpart of gather_offset.
template <typename T>
DK_INLINE void store_offset(const Offset<T>& offset, int64_t n, int t, int64_t row,
                            const int64_t* column, const T (*grad)[kTile]) {
  const OffsetStrides s = offset.strides;
  T* base = offset.data + n * s.n + 2 * t * s.c + row * s.h;
  for (int i = 0; i < kTile; ++i) {
    if (column[i] < 0) continue;
    base[column[i] * s.w] = grad[0][i];
    base[column[i] * s.w + s.c] = grad[1][i];
  }
}

// *p += v, a vector.
template <typename V, typename T>
DK_INLINE void add_to(T* p, const V& v) {
  store(p, load<V>(p) + v);
}

// ---- forward -----------------------------------------------------------------------------------

// The rigid data grid: which input pixel a tap of each output pixel reads, -1 in the padding.
struct PixelTile {
  int64_t offset[kTile];
};

DK_INLINE void fill_pixel_tile(const DepthwiseParams& p, int t, int64_t row, const int64_t* column,
                               PixelTile& tile) {
  const int64_t y = row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h;
  for (int i = 0; i < kTile; ++i) {
    const int64_t x = column[i] * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w;
    const bool inside = y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
    tile.offset[i] = inside ? (y * p.in_w + x) * p.channels : -1;
  }
}

// One output pixel.
template <typename scalar_t, bool kKernel, bool kData>
struct ForwardPixel {
  using T = opmath_t<scalar_t>;
  const DepthwiseForward<scalar_t>& a;
  const ScopeTile<T>* scope;  // per tap, if kKernel
  const ImageTile<T>* image;  // per tap, if kData
  const PixelTile* pixels;    // per tap, if not kData
  const scalar_t* input;      // of the image
  scalar_t* output;           // of the pixel
  int i;                      // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V acc[U];
    for (int u = 0; u < U; ++u) acc[u] = a.bias ? load<V>(a.bias + c + u * L) : V{};
    const int taps = a.params.taps();
    for (int t = 0; t < taps; ++t) {
      const scalar_t* x = input + c;
      if constexpr (!kData) {
        if (pixels[t].offset[i] < 0) {
          add_padding(t, acc, U);
          continue;
        }
        x += pixels[t].offset[i];
      }
      const T* w = a.weight + c + (kKernel ? 0 : t * a.params.channels);
      for (int u = 0; u < U; ++u)
        acc[u] += sample_weight<V>(t, w + u * L) * sample_value<V>(t, x + u * L);
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
  DK_INLINE V sample_weight(int t, const T* w) const {
    if constexpr (kKernel)
      return interpolate<V>(scope[t], i, w);
    else
      return load<V>(w);
  }

  template <typename V>
  DK_INLINE V sample_value(int t, const scalar_t* x) const {
    if constexpr (kData)
      return interpolate<V>(image[t], i, x);
    else
      return load<V>(x);
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
        const int64_t c_end = c + kChannelBlock < p.channels ? c + kChannelBlock : p.channels;
        for (int i = 0; i < count; ++i) {
          const ForwardPixel<scalar_t, kKernel, kData> pixel{
              a,
              scope.tiles,
              image.tiles,
              pixels.tiles,
              input,
              a.output + (line * p.out_w + x + i) * p.channels,
              i};
          for_channels<T, kGroup>(c, c_end, pixel);
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

// ---- backward, rigid data grid -----------------------------------------------------------------
//
// By input pixels: pixel q and tap t meet in the one output p = (q + pad - k_t * dilation) /
// stride, if that is on the stride grid. Every (p, t) is visited once, so x and grad_output are
// read once, grad_input and grad_kernel_offset are written once, and nothing is scattered.

// The output that a tap of each input pixel of a tile feeds: its columns (< 0: none) and row.
DK_INLINE int64_t fed_output(int64_t in, int64_t pad, int64_t tap, int64_t dilation, int64_t stride,
                             int64_t size) {
  const int64_t position = in + pad - tap * dilation;
  if (position < 0 || position % stride) return -1;
  return position / stride < size ? position / stride : -1;
}

// One input pixel.
template <typename scalar_t, bool kKernel>
struct BackwardPixel {
  using T = opmath_t<scalar_t>;
  const DepthwiseBackward<scalar_t>& a;
  const ScopeTile<T>* scope;    // per tap, if kKernel
  const PixelTile* pixels;      // per tap: element offset in grad_output, -1: none
  const scalar_t* input;        // of the pixel
  const scalar_t* grad_output;  // of the image
  scalar_t* grad_input;         // of the pixel
  T* grad_weight;
  T (*grad_offset)[2][kTile];  // per tap
  int i;                       // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V x[U], grad_x[U];
    for (int u = 0; u < U; ++u) {
      x[u] = load<V>(input + c + u * L);
      grad_x[u] = V{};
    }
    const int taps = a.params.taps();
    for (int t = 0; t < taps; ++t) {
      if (pixels[t].offset[i] < 0) continue;
      const scalar_t* grad = grad_output + pixels[t].offset[i] + c;
      if constexpr (kKernel) {
        const ScopeTile<T>& tile = scope[t];
        V dot[4] = {};  // Σ over channels of grad * x * the cell's weight
        for (int u = 0; u < U; ++u) {
          const V g = load<V>(grad + u * L);
          const V gx = g * x[u];
          V weight{};
          for (int j = 0; j < 4; ++j) {
            const int64_t cell = tile.cell[j][i] + c + u * L;
            const V w = load<V>(a.weight + cell);
            weight += tile.coef[j][i] * w;
            dot[j] += gx * w;
            add_to<V>(grad_weight + cell, tile.coef[j][i] * gx);
          }
          grad_x[u] += g * weight;
        }
        add_offset_gradient(tile, i, dot, grad_offset[t]);
      } else {
        for (int u = 0; u < U; ++u) {
          const V g = load<V>(grad + u * L);
          const int64_t cell = t * a.params.channels + c + u * L;
          grad_x[u] += g * load<V>(a.weight + cell);
          add_to<V>(grad_weight + cell, g * x[u]);
        }
      }
    }
    for (int u = 0; u < U; ++u) store(grad_input + c + u * L, grad_x[u]);
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_rows(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,
                             opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  typedef T OffsetTile[2][kTile];
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<PixelTile> pixels(taps);
  Scratch<OffsetTile> grad_offset(kKernel ? taps : 1);
  Scratch<int64_t[kTile]> column(taps);
  Scratch<int64_t> row(taps);
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
        if constexpr (kKernel) {
          if (row.tiles[t] >= 0) {
            fill_scope_tile(p, a.kernel_offset, n, t, row.tiles[t], column.tiles[t],
                            scope.tiles[t]);
          }
          std::memset(grad_offset.tiles[t], 0, sizeof(OffsetTile));
        }
      }
      for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
        const int64_t c_end = c + kChannelBlock < p.channels ? c + kChannelBlock : p.channels;
        for (int i = 0; i < count; ++i) {
          const int64_t pixel = (line * p.in_w + x + i) * p.channels;
          const BackwardPixel<scalar_t, kKernel> body{a,
                                                      scope.tiles,
                                                      pixels.tiles,
                                                      a.input + pixel,
                                                      grad_output,
                                                      grad_input + pixel,
                                                      grad_weight,
                                                      grad_offset.tiles,
                                                      i};
          for_channels<T, kBackwardGroup>(c, c_end, body);
        }
      }
      if constexpr (kKernel) {
        for (int t = 0; t < taps; ++t) {
          store_offset(a.grad_kernel_offset, n, t, row.tiles[t], column.tiles[t],
                       grad_offset.tiles[t]);
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

// One output pixel: gradients of weight and offsets.
template <typename scalar_t, bool kKernel>
struct BackwardDataOffsetPixel {
  using T = opmath_t<scalar_t>;
  const DepthwiseBackward<scalar_t>& a;
  const ScopeTile<T>* scope;    // per tap, if kKernel
  const ImageTile<T>* image;    // per tap
  const scalar_t* input;        // of the image
  const scalar_t* grad_output;  // of the pixel
  T* grad_weight;
  T (*grad_kernel)[2][kTile];  // per tap, if kKernel
  T (*grad_data)[2][kTile];    // per tap
  int i;                       // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    const int taps = a.params.taps();
    for (int t = 0; t < taps; ++t) {
      const ImageTile<T>& data = image[t];
      V kernel_dot[4] = {}, data_dot[4] = {};
      for (int u = 0; u < U; ++u) {
        const V g = load<V>(grad_output + c + u * L);
        V x[4], value{}, weight{};
        for (int j = 0; j < 4; ++j) {
          x[j] = load<V>(input + data.cell[j][i] + c + u * L);
          value += data.coef[j][i] * x[j];
        }
        const V gx = g * value;
        if constexpr (kKernel) {
          const ScopeTile<T>& tile = scope[t];
          for (int j = 0; j < 4; ++j) {
            const int64_t cell = tile.cell[j][i] + c + u * L;
            const V w = load<V>(a.weight + cell);
            weight += tile.coef[j][i] * w;
            kernel_dot[j] += gx * w;
            add_to<V>(grad_weight + cell, tile.coef[j][i] * gx);
          }
        } else {
          const int64_t cell = t * a.params.channels + c + u * L;
          weight = load<V>(a.weight + cell);
          add_to<V>(grad_weight + cell, gx);
        }
        const V gw = g * weight;
        for (int j = 0; j < 4; ++j) data_dot[j] += gw * x[j];
      }
      add_offset_gradient(data, i, data_dot, grad_data[t]);
      if constexpr (kKernel) add_offset_gradient(scope[t], i, kernel_dot, grad_kernel[t]);
    }
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_data_offset_rows(const DepthwiseBackward<scalar_t>& a,
                                         opmath_t<scalar_t>* grad_weight, int64_t begin,
                                         int64_t end) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  typedef T OffsetTile[2][kTile];
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(taps);
  Scratch<OffsetTile> grad_kernel(kKernel ? taps : 1), grad_data(taps);
  int64_t column[kTile];
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / p.out_h, row = line % p.out_h;
    const scalar_t* input = a.input + n * p.in_h * p.in_w * p.channels;
    for (int64_t x = 0; x < p.out_w; x += kTile) {
      const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
      output_columns(x, count, column);
      for (int t = 0; t < taps; ++t) {
        fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
        std::memset(grad_data.tiles[t], 0, sizeof(OffsetTile));
        if constexpr (kKernel) {
          fill_scope_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
          std::memset(grad_kernel.tiles[t], 0, sizeof(OffsetTile));
        }
      }
      for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
        const int64_t c_end = c + kChannelBlock < p.channels ? c + kChannelBlock : p.channels;
        for (int i = 0; i < count; ++i) {
          const BackwardDataOffsetPixel<scalar_t, kKernel> pixel{
              a,
              scope.tiles,
              image.tiles,
              input,
              a.grad_output + (line * p.out_w + x + i) * p.channels,
              grad_weight,
              grad_kernel.tiles,
              grad_data.tiles,
              i};
          for_channels<T, kBackwardGroup>(c, c_end, pixel);
        }
      }
      for (int t = 0; t < taps; ++t) {
        store_offset(a.grad_data_offset, n, t, row, column, grad_data.tiles[t]);
        if constexpr (kKernel) {
          store_offset(a.grad_kernel_offset, n, t, row, column, grad_kernel.tiles[t]);
        }
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
  const DepthwiseBackward<scalar_t>& a;
  const ScopeTile<T>* scope;    // per tap, if kKernel
  const ImageTile<T>* image;    // per tap
  const scalar_t* grad_output;  // of the pixel
  T* grad_input;                // of the image
  int i;                        // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    const int taps = a.params.taps();
    for (int t = 0; t < taps; ++t) {
      const T* w = a.weight + c + (kKernel ? 0 : t * a.params.channels);
      for (int u = 0; u < U; ++u) {
        V weight;
        if constexpr (kKernel)
          weight = interpolate<V>(scope[t], i, w + u * L);
        else
          weight = load<V>(w + u * L);
        const V grad = load<V>(grad_output + c + u * L) * weight;
        for (int j = 0; j < 4; ++j) {
          if (image[t].coef[j][i] == T(0)) continue;  // outside the image: its cell is not its own
          add_to<V>(grad_input + image[t].cell[j][i] + c + u * L, image[t].coef[j][i] * grad);
        }
      }
    }
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_data_channels(const DepthwiseBackward<scalar_t>& a,
                                      opmath_t<scalar_t>* grad_input, int64_t n, int64_t begin,
                                      int64_t end) {
  using T = opmath_t<scalar_t>;
  const DepthwiseParams& p = a.params;
  const int taps = p.taps();
  Scratch<ScopeTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(taps);
  int64_t column[kTile];
  for (int64_t row = 0; row < p.out_h; ++row) {
    for (int64_t x = 0; x < p.out_w; x += kTile) {
      const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
      output_columns(x, count, column);
      for (int t = 0; t < taps; ++t) {
        fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
        if constexpr (kKernel) {
          fill_scope_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
        }
      }
      for (int i = 0; i < count; ++i) {
        const BackwardDataPixel<scalar_t, kKernel> pixel{
            a,
            scope.tiles,
            image.tiles,
            a.grad_output + ((n * p.out_h + row) * p.out_w + x + i) * p.channels,
            grad_input + n * p.in_h * p.in_w * p.channels,
            i};
        for_channels<T, kBackwardGroup>(begin, end, pixel);
      }
    }
  }
}

template <typename scalar_t>
void backward_data(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input, int64_t n,
                   int64_t begin, int64_t end) {
  if (a.kernel_offset.data)
    backward_data_channels<true>(a, grad_input, n, begin, end);
  else
    backward_data_channels<false>(a, grad_input, n, begin, end);
}

#define DK_INSTANTIATE(scalar_t)                                                                \
  template void forward(const DepthwiseForward<scalar_t>&, int64_t, int64_t);                   \
  template void backward(const DepthwiseBackward<scalar_t>&, scalar_t*, opmath_t<scalar_t>*,    \
                         int64_t, int64_t);                                                     \
  template void backward_data_offset(const DepthwiseBackward<scalar_t>&, opmath_t<scalar_t>*,   \
                                     int64_t, int64_t);                                         \
  template void backward_data(const DepthwiseBackward<scalar_t>&, opmath_t<scalar_t>*, int64_t, \
                              int64_t, int64_t);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)
DK_INSTANTIATE(c10::Half)
DK_INSTANTIATE(c10::BFloat16)
#undef DK_INSTANTIATE

}  // namespace DK_ISA
}  // namespace dk

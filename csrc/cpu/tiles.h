// What the CPU kernels share: vectors, tiles of pixels and their taps, sums over channels. In
// GCC/Clang vector extensions. Included once per instruction set and type by files that define
// DK_ISA (a namespace), DK_VECTOR_BYTES and DK_TYPE and set the target. Nothing here may
// instantiate templates of other headers out of line: the linker would keep one copy for all
// targets.
//
// Work goes by tiles of pixels in a row. For each tap, the bilinear coefficients of a tile are
// computed once, vectorised over pixels, and shared by all channels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../bilinear.h"  // for the target: nothing of it is compiled out of line
#include "kernels.h"

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

// x in every lane. (x + 0 would be an addition, which makes 0 of -0.)
template <typename V, typename T>
DK_INLINE V broadcast(T x) {
  return x - V{};
}

// *p += v, a vector.
template <typename V, typename T>
DK_INLINE void add_to(T* p, const V& v) {
  store(p, load<V>(p) + v);
}

// GCC reads a value that is used twice from memory twice, where loads are what limits the loop.
template <typename V>
DK_INLINE void keep_in_register(V& v) {
#if DK_VECTOR_BYTES > 16
  if constexpr (sizeof(V) <= DK_VECTOR_BYTES) asm("" : "+v"(v));
#endif
}

// Of single channels, also keeps GCC from vectorising their loop, which takes it minutes.
template <typename V, typename T>
DK_INLINE V load_once(const T* p) {
  V v = load<V>(p);
  keep_in_register(v);
  return v;
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
    if constexpr (sizeof(V) == 64) return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if DK_VECTOR_BYTES >= 32
    if constexpr (sizeof(V) == 32) return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    if constexpr (sizeof(V) == 16) return (V)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#endif
    V v;
    for (int i = 0; i < lanes<V, float>; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }
}

template <typename V>
DK_INLINE void store(c10::Half* p, const V& v) {
  if constexpr (std::is_same_v<V, float>) {
    *p = v;
  } else {
#if DK_VECTOR_BYTES >= 32
    constexpr int rounding = _MM_FROUND_TO_NEAREST_INT;
#endif
#if DK_VECTOR_BYTES == 64
    if constexpr (sizeof(V) == 64)
      return _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, rounding));
#endif
#if DK_VECTOR_BYTES >= 32
    if constexpr (sizeof(V) == 32)
      return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, rounding));
    if constexpr (sizeof(V) == 16)
      return _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)v, rounding));
#endif
    for (int i = 0; i < lanes<V, float>; ++i) p[i] = v[i];
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

// In blocks of n elements: every second one of a and the one of b before its like change places.
template <int n, typename T, typename V, int... l>
DK_INLINE void exchange(V& a, V& b, std::integer_sequence<int, l...>) {
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr int L = sizeof...(l);
  const V first = DK_SHUFFLE(a, b, (l & n ? L + l - n : l)...);
  b = DK_SHUFFLE(a, b, (l & n ? L + l : l + n)...);
  a = first;
}

// As many vectors as each has elements, which become the columns.
template <typename T, int n = 1, typename V, int L>
DK_INLINE void transpose_square(V (&v)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (!(i & n)) exchange<n, T>(v[i], v[i + n], std::make_integer_sequence<int, L>());
  }
  if constexpr (2 * n < L) transpose_square<T, 2 * n>(v);
}

// to[j, i] = from[i, j]; rows of either lie a number of elements apart. By squares of L elements,
// and what is left by smaller ones.
template <int L, typename From, typename To>
DK_INLINE void transpose_by(const From* from, int64_t from_step, int64_t rows, int64_t columns,
                            To* to, int64_t to_step) {
  using T = opmath_t<To>;
  const int64_t whole_rows = rows / L * L, whole_columns = columns / L * L;
  for (int64_t i = 0; i < whole_rows; i += L) {
    for (int64_t j = 0; j < whole_columns; j += L) {
      if constexpr (L == 1) {
        to[j * to_step + i] = static_cast<To>(from[i * from_step + j]);
      } else {
        typedef typename VectorOf<T, L * sizeof(T)>::type V;
        V v[L];
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) v[k] = load<V>(from + (i + k) * from_step + j);
        transpose_square<T>(v);
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) store(to + (j + k) * to_step + i, v[k]);
      }
    }
  }
  if constexpr (L > 1) {
    constexpr int half = L > 4 ? L / 2 : 1;
    transpose_by<half>(from + whole_columns, from_step, whole_rows, columns - whole_columns,
                       to + whole_columns * to_step, to_step);
    transpose_by<half>(from + whole_rows * from_step, from_step, rows - whole_rows, columns,
                       to + whole_rows, to_step);
  }
}

template <typename From, typename To>
DK_INLINE void transpose(const From* from, int64_t from_step, int64_t rows, int64_t columns, To* to,
                         int64_t to_step) {
  using T = opmath_t<To>;
  transpose_by<lanes<Vector<T>, T>>(from, from_step, rows, columns, to, to_step);
}

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

  // Pixels i ... of the tile; cells lie `step` elements apart, rows of `width` cells. The taps
  // count `factor` times.
  DK_INLINE void set(int i, AxisSample<Vector<T>> h, const AxisSample<Vector<T>>& w, index_t width,
                     index_t step, const Vector<T>& factor) {
    typedef Like<index_t, T> I;
    for (int j = 0; j < 2; ++j) {
      h.coef[j] *= factor;
      h.grad[j] *= factor;
    }
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

// Per-call scratch: mostly one Tile per tap.
template <typename Tile>
struct Scratch {
  explicit Scratch(int64_t count) {
    const int64_t bytes = (sizeof(Tile) * count + 63) / 64 * 64;
    tiles = static_cast<Tile*>(std::aligned_alloc(64, bytes));
    if (!tiles) out_of_memory(bytes);
  }
  ~Scratch() { std::free(tiles); }
  Scratch(const Scratch&) = delete;
  Tile* tiles;
};

// Calls body(i, column[i] * step) for the pixels of a tile that are there: column[i] >= 0. Mostly
// all are, next to each other, which is done by vectors.
template <typename Body>
DK_INLINE void for_pixels(const int64_t* column, int64_t step, const Body& body) {
  const int64_t first = column[0];
  if (step == 1 && first >= 0 && column[kTile - 1] == first + kTile - 1) {
    for (int i = 0; i < kTile; ++i) body(i, first + i);
  } else {
    for (int i = 0; i < kTile; ++i) {
      if (column[i] >= 0) body(i, column[i] * step);
    }
  }
}

// Offsets of tap t at the output pixels (row, column[i]); 0 where there is none.
template <typename T>
DK_INLINE void gather_offset(const Offset<const T>& offset, int64_t n, int t, int64_t row,
                             const int64_t* column, T* h, T* w) {
  const OffsetStrides s = offset.strides;
  const T* base = offset.data + n * s.n + 2 * t * s.c + row * s.h;
  for (int i = 0; i < kTile; ++i) h[i] = w[i] = 0;
  for_pixels(column, s.w, [&](int i, int64_t at) {
    h[i] = base[at];
    w[i] = base[at + s.c];
  });
}

// What the tap is multiplied by there.
template <typename T>
DK_INLINE void gather_factor(const ConvParams& p, const Offset<const T>& offset, int64_t n, int t,
                             int64_t row, const int64_t* column, T* factor) {
  const OffsetStrides s = offset.strides;
  const T* base = offset.data + n * s.n + (2 * p.taps() + t) * s.c + row * s.h;
  for (int i = 0; i < kTile; ++i) factor[i] = 1;
  if (!offset.modulated) return;
  for_pixels(column, s.w, [&](int i, int64_t at) { factor[i] = base[at]; });
}

// Their locations in the scope.
template <typename T>
DK_INLINE void locate_in_scope(const ConvParams& p, const Offset<const T>& offset, int64_t n, int t,
                               int64_t row, const int64_t* column, T* h, T* w) {
  gather_offset(offset, n, t, row, column, h, w);
  const T rest_h = T(p.scope_h - p.kernel_h) / 2 + T(t / p.kernel_w);
  const T rest_w = T(p.scope_w - p.kernel_w) / 2 + T(t % p.kernel_w);
  for (int i = 0; i < kTile; ++i) {
    h[i] += rest_h;
    w[i] += rest_w;
  }
}

template <typename T>
DK_INLINE void fill_scope_tile(const ConvParams& p, const Offset<const T>& offset, int64_t n, int t,
                               int64_t row, const int64_t* column, int step, ScopeTile<T>& tile) {
  typedef Vector<T> V;
  T h[kTile], w[kTile], factor[kTile];
  locate_in_scope(p, offset, n, t, row, column, h, w);
  gather_factor(p, offset, n, t, row, column, factor);
  for (int i = 0; i < kTile; i += lanes<V, T>) {
    tile.set(i, sample_scope(load<V>(h + i), p.scope_h, p.clip),
             sample_scope(load<V>(w + i), p.scope_w, p.clip), p.scope_w, step, load<V>(factor + i));
  }
}

template <typename T>
DK_INLINE void fill_image_tile(const ConvParams& p, const Offset<const T>& offset, int64_t n, int t,
                               int64_t row, const int64_t* column, ImageTile<T>& tile) {
  typedef Vector<T> V;
  T h[kTile], w[kTile], factor[kTile];
  gather_offset(offset, n, t, row, column, h, w);
  gather_factor(p, offset, n, t, row, column, factor);
  const T y = T(row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h);
  for (int i = 0; i < kTile; ++i)
    w[i] += T(column[i] * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w);
  for (int i = 0; i < kTile; i += lanes<V, T>) {
    tile.set(i, sample_image(y + load<V>(h + i), static_cast<int>(p.in_h)),
             sample_image(load<V>(w + i), static_cast<int>(p.in_w)), p.in_w, p.channels,
             load<V>(factor + i));
  }
}

// Columns begin .. begin + count of an output row, the rest of the tile marked as absent.
DK_INLINE void output_columns(int64_t begin, int count, int64_t* column) {
  for (int i = 0; i < kTile; ++i) column[i] = i < count ? begin + i : -1;
}

// ---- patches of the scope ----------------------------------------------------------------------
//
// Four neighbouring cells as what a bilinear sample needs with the fewest multiplications: the
// value at the first and its slopes by w, by h and by both. [patches, 4, kChannelBlock] for a block
// of channels. All patches that a location may fall into: without clipping also those around the
// edge, where the cells outside are 0.

// Patches along an axis, and the lower cell of the first.
DK_INLINE int count_patches(int size, bool clip) {
  return !clip ? size + 1 : size > 1 ? size - 1 : 1;
}
DK_INLINE int first_patch(bool clip) { return clip ? 0 : -1; }

constexpr int64_t kPatch = 4 * kChannelBlock;

DK_INLINE int64_t patch_values(const ConvParams& p) {
  return kPatch * count_patches(p.scope_h, p.clip) * count_patches(p.scope_w, p.clip);
}

// Calls body(patch, cells) with the element offsets of each patch and of its four cells, -1 for
// those outside.
template <typename Body>
DK_INLINE void for_patches(const ConvParams& p, const Body& body) {
  const int columns = count_patches(p.scope_w, p.clip), first = first_patch(p.clip);
  for (int64_t patch = 0; patch < patch_values(p); patch += kPatch) {
    const int index = static_cast<int>(patch / kPatch);
    int64_t cells[4];
    for (int j = 0; j < 4; ++j) {
      const int h = index / columns + first + j / 2, w = index % columns + first + j % 2;
      const bool inside = h >= 0 && h < p.scope_h && w >= 0 && w < p.scope_w;
      cells[j] = inside ? (h * p.scope_w + w) * kChannelBlock : -1;
    }
    body(patch, cells);
  }
}

// From the cells of a block of channels.
template <typename T>
DK_INLINE const T* make_patches(const ConvParams& p, const T* weight, T* patches) {
  typedef Vector<T> V;
  for_patches(p, [&](int64_t patch, const int64_t (&cells)[4]) {
    for (int64_t c = 0; c < kChannelBlock; c += lanes<V, T>) {
      V w[4];
      for (int j = 0; j < 4; ++j) w[j] = cells[j] < 0 ? V{} : load<V>(weight + cells[j] + c);
      T* to = patches + patch + c;
      store(to, w[0]);
      store(to + kChannelBlock, w[1] - w[0]);
      store(to + 2 * kChannelBlock, w[2] - w[0]);
      store(to + 3 * kChannelBlock, w[3] - w[2] - (w[1] - w[0]));
    }
  });
  return patches;
}

// The transpose: adds the gradient of the patches to that of the cells.
template <typename T>
DK_INLINE void add_patches(const ConvParams& p, const T* patches, T* weight) {
  typedef Vector<T> V;
  for_patches(p, [&](int64_t patch, const int64_t (&cells)[4]) {
    for (int64_t c = 0; c < kChannelBlock; c += lanes<V, T>) {
      V s[4];
      for (int j = 0; j < 4; ++j) s[j] = load<V>(patches + patch + j * kChannelBlock + c);
      const V cell[4] = {s[0] - s[1] - (s[2] - s[3]), s[1] - s[3], s[2] - s[3], s[3]};
      for (int j = 0; j < 4; ++j) {
        if (cells[j] >= 0) add_to(weight + cells[j] + c, cell[j]);
      }
    }
  });
}

// Where one tap of each pixel of a tile reads the scope: the element offset of its patch and the
// location in that, the slope of either axis, and what the tap is multiplied by.
template <typename T>
struct PatchTile {
  int patch[kTile];
  T h[kTile], w[kTile], slope_h[kTile], slope_w[kTile], factor[kTile];
};

// One axis of a patch: its index, the location in it, the slope. Too far outside, the value is that
// at the outer end of the first patch, 0.
template <typename V>
DK_INLINE ScopeLocation<V> find_patch(V x, int size, bool clip) {
  ScopeLocation<V> at = find_in_scope(x, size, clip);
  const int first = first_patch(clip);
  const auto inside = (at.lower >= first) & (at.lower < size);
  at.x = inside ? at.x - Numbers<V>::convert(at.lower) : V{};
  at.lower = inside ? at.lower - first : decltype(at.lower){};
  at.slope = inside ? at.slope : V{};
  return at;
}

template <typename T>
DK_INLINE void fill_patch_tile(const ConvParams& p, const Offset<const T>& offset, int64_t n, int t,
                               int64_t row, const int64_t* column, PatchTile<T>& tile) {
  typedef Vector<T> V;
  T h[kTile], w[kTile];
  locate_in_scope(p, offset, n, t, row, column, h, w);
  gather_factor(p, offset, n, t, row, column, tile.factor);
  const int columns = count_patches(p.scope_w, p.clip);
  for (int i = 0; i < kTile; i += lanes<V, T>) {
    const auto at_h = find_patch(load<V>(h + i), p.scope_h, p.clip);
    const auto at_w = find_patch(load<V>(w + i), p.scope_w, p.clip);
    const auto patch = (at_h.lower * columns + at_w.lower) * static_cast<int>(kPatch);
    store(tile.patch + i, __builtin_convertvector(patch, Like<int, T>));
    store(tile.h + i, at_h.x);
    store(tile.w + i, at_w.x);
    store(tile.slope_h + i, at_h.slope);
    store(tile.slope_w + i, at_w.slope);
  }
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
DK_INLINE int64_t block_width(const ConvParams& p, int64_t c) {
  return p.channels - c < kChannelBlock ? p.channels - c : kChannelBlock;
}

// The four cells of a tap of one pixel.
template <typename V, typename T, typename index_t>
struct Cells {
  V coef[4];
  index_t cell[4];

  DK_INLINE Cells(const TapTile<T, index_t>& tile, int i) {
    for (int j = 0; j < 4; ++j) {
      coef[j] = broadcast<V>(tile.coef[j][i]);
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
  // The same, where the four values are also wanted.
  template <typename scalar_t>
  DK_INLINE V sample(const scalar_t* values, V (&v)[4]) const {
    for (int j = 0; j < 4; ++j) {
      v[j] = value(values, j);
      keep_in_register(v[j]);
    }
    V sum = coef[0] * v[0];
    for (int j = 1; j < 4; ++j) sum += coef[j] * v[j];
    return sum;
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

// Has a block of channels in the second-level cache (what is 2 here) by the time that its tile is
// next: the tiles' jumps defeat the processor's own guesses, and the first level is full with this
// tile. A prefetch past the end of a tensor does nothing.
template <bool kWrite, typename scalar_t>
DK_INLINE void prefetch(const scalar_t* block) {
  for (size_t byte = 0; byte < kChannelBlock * sizeof(scalar_t); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(block) + byte, kWrite, 2);
}

// How tap t of pixel i of a tile reads the scope: sampled or, without kernel offsets, its own cell.
template <typename V, bool kKernel, typename T>
DK_INLINE auto scope_sampler(const ScopeTile<T>* scope, int t, int i, int64_t step) {
  if constexpr (kKernel)
    return Cells<V, T, int>(scope[t], i);
  else
    return Cell<V>{t * step};
}

// The rigid data grid: which input pixel a tap of each output pixel reads (or, backward, which
// output pixel it feeds), as an element offset; -1 for none.
struct PixelTile {
  int64_t offset[kTile];
};

// Where an image's pixels lie: `step` elements apart, in rows of `width`, of which `kept` have a
// place of their own.
struct Places {
  int64_t kept, width, step;
  // The first pixel of a row. (A division: for a whole tile.)
  DK_INLINE int64_t row(int64_t row) const { return row % kept * width * step; }
};

DK_INLINE void fill_pixel_tile(const ConvParams& p, int t, int64_t row, const int64_t* column,
                               const Places& places, PixelTile& tile) {
  const int64_t y = row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h;
  const int64_t left = t % p.kernel_w * p.dilation_w - p.pad_w;
  const int64_t width = y >= 0 && y < p.in_h ? p.in_w : 0, first = width ? places.row(y) : 0;
  for (int i = 0; i < kTile; ++i) {
    const int64_t x = column[i] * p.stride_w + left;
    tile.offset[i] = x >= 0 && x < width ? first + x * places.step : -1;
  }
}

// The output row (column) that reads an input row (column) through a tap, -1 for none.
DK_INLINE int64_t fed_output(int64_t in, int64_t pad, int64_t tap, int64_t dilation, int64_t stride,
                             int64_t size) {
  const int64_t position = in + pad - tap * dilation;
  if (stride == 1) return position >= 0 && position < size ? position : -1;  // divisions are slow
  if (position < 0 || position % stride) return -1;
  return position / stride < size ? position / stride : -1;
}

// Those of the input columns begin .. begin + count that a tap of this column of the kernel feeds.
DK_INLINE void fed_columns(const ConvParams& p, int64_t begin, int count, int tap,
                           int64_t* column) {
  const auto fill = [&](auto stride) {
    for (int i = 0; i < kTile; ++i) {
      const int64_t x = fed_output(begin + i, p.pad_w, tap, p.dilation_w, stride, p.out_w);
      column[i] = i < count ? x : -1;
    }
  };
  if (p.stride_w == 1)
    fill(std::integral_constant<int64_t, 1>());
  else
    fill(p.stride_w);
}

// Calls f(has kernel_offset, has data_offset) with compile-time answers.
template <typename Args, typename F>
DK_INLINE void dispatch_offsets(const Args& a, const F& f) {
  const bool kernel = a.kernel_offset.data, data = a.data_offset.data;
  if (kernel && data)
    f(std::true_type(), std::true_type());
  else if (kernel)
    f(std::true_type(), std::false_type());
  else if (data)
    f(std::false_type(), std::true_type());
  else
    f(std::false_type(), std::false_type());
}

// ---- gradients of offsets ----------------------------------------------------------------------

// For one tap of each pixel of a tile and each of its four cells: Σ over channels of the cell's
// value times what it is multiplied with. Of a patch instead: of its derivatives by h and w and, if
// there are factors, of its value times what it is multiplied with apart from the factor.
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

template <typename T>
DK_INLINE void offset_gradient(const PatchTile<T>& tile, const DotTile<T>& dots, T* h, T* w) {
  for (int i = 0; i < kTile; ++i) {
    h[i] = tile.slope_h[i] * dots.dot[i][0];
    w[i] = tile.slope_w[i] * dots.dot[i][1];
  }
}

// Adds to h and w the sums over the blocks of channels before. Only of the pixels that are there:
// another thread may be writing any other.
template <typename T>
DK_INLINE void add_before(const Offset<T>& grad, int64_t n, int t, int64_t row,
                          const int64_t* column, T* h, T* w) {
  const OffsetStrides s = grad.strides;
  const T* base = grad.data + n * s.n + 2 * t * s.c + row * s.h;
  for_pixels(column, s.w, [&](int i, int64_t at) {
    h[i] += base[at];
    w[i] += base[at + s.c];
  });
}

// The counterpart of gather_offset.
template <typename T>
DK_INLINE void scatter_offset(const Offset<T>& offset, int64_t n, int t, int64_t row,
                              const int64_t* column, const T* h, const T* w) {
  const OffsetStrides s = offset.strides;
  T* base = offset.data + n * s.n + 2 * t * s.c + row * s.h;
  for_pixels(column, s.w, [&](int i, int64_t at) { base[at] = h[i]; });
  for_pixels(column, s.w, [&](int i, int64_t at) { base[at + s.c] = w[i]; });
}

template <typename T>
DK_INLINE Offset<const T> without_factors(Offset<const T> offset) {
  offset.modulated = false;
  return offset;
}

// Gradients of the factors; `tile` is that of the taps without them.
template <typename T, typename index_t>
DK_INLINE void factor_gradient(const TapTile<T, index_t>& tile, const DotTile<T>& dots, T* factor) {
  for (int i = 0; i < kTile; ++i) {
    factor[i] = 0;
    for (int j = 0; j < 4; ++j) factor[i] += tile.coef[j][i] * dots.dot[i][j];
  }
}

// The counterpart of gather_factor; adds.
template <typename T>
DK_INLINE void scatter_factor(const ConvParams& p, const Offset<T>& grad, int64_t n, int t,
                              int64_t row, const int64_t* column, const T* factor) {
  const OffsetStrides s = grad.strides;
  T* base = grad.data + n * s.n + (2 * p.taps() + t) * s.c + row * s.h;
  for_pixels(column, s.w, [&](int i, int64_t at) { base[at] += factor[i]; });
}

// (These two are called once a tile: inlined, they would take registers from the loops over
// channels.)
template <typename Args, typename T>
__attribute__((noinline)) void add_data_offset_gradient(const Args& a, int64_t n, int t,
                                                        int64_t row, const int64_t* column,
                                                        const ImageTile<T>& tile,
                                                        const DotTile<T>& dots) {
  const ConvParams& p = a.params;
  T h[kTile], w[kTile];
  offset_gradient(tile, dots, h, w);
  add_before(a.grad_data_offset, n, t, row, column, h, w);
  scatter_offset(a.grad_data_offset, n, t, row, column, h, w);
  if (a.data_offset.modulated) {
    ImageTile<T> plain;
    fill_image_tile(p, without_factors(a.data_offset), n, t, row, column, plain);
    factor_gradient(plain, dots, h);
    scatter_factor(p, a.grad_data_offset, n, t, row, column, h);
  }
}

template <typename Args, typename T>
DK_INLINE void factor_gradient(const Args& a, int64_t n, int t, int64_t row, const int64_t* column,
                               const ScopeTile<T>&, const DotTile<T>& dots, T* factor) {
  ScopeTile<T> plain;
  fill_scope_tile(a.params, without_factors(a.kernel_offset), n, t, row, column, /*step=*/0, plain);
  factor_gradient(plain, dots, factor);
}

template <typename Args, typename T>
DK_INLINE void factor_gradient(const Args&, int64_t, int, int64_t, const int64_t*,
                               const PatchTile<T>&, const DotTile<T>& dots, T* factor) {
  for (int i = 0; i < kTile; ++i) factor[i] = dots.dot[i][2];
}

// `last`: the sums are then over all channels.
template <typename Args, typename Tile, typename T>
__attribute__((noinline)) void add_kernel_offset_gradient(const Args& a, int64_t n, int t,
                                                          int64_t row, const int64_t* column,
                                                          const Tile& tile, const DotTile<T>& dots,
                                                          bool last) {
  const ConvParams& p = a.params;
  T h[kTile], w[kTile];
  offset_gradient(tile, dots, h, w);
  add_before(a.grad_kernel_offset, n, t, row, column, h, w);
  if (p.clip && last) {
    T y[kTile], x[kTile];
    locate_in_scope(p, a.kernel_offset, n, t, row, column, y, x);
    for (int i = 0; i < kTile; ++i) {
      h[i] = inward(y[i], p.scope_h, h[i]);
      w[i] = inward(x[i], p.scope_w, w[i]);
    }
  }
  scatter_offset(a.grad_kernel_offset, n, t, row, column, h, w);
  if (a.kernel_offset.modulated) {
    factor_gradient(a, n, t, row, column, tile, dots, h);
    scatter_factor(p, a.grad_kernel_offset, n, t, row, column, h);
  }
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

}  // namespace DK_ISA
}  // namespace dk

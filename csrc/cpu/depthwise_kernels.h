// The depthwise kernels. Included once per instruction set: tiles.h.
//
// Each pixel of a tile runs over its channels in groups of up to kGroup vectors. A block of
// channels is done for the whole tile before the next, so that its scope (S_h*S_w*kChannelBlock
// values, next to each other: at the distance of all channels, often a power of two, they would
// evict each other) stays in the first-level cache.
#include "tiles.h"

namespace dk {
namespace DK_ISA {

// ---- the scope ---------------------------------------------------------------------------------

// Where a tap reads its patch.
template <typename V>
struct PatchLocation {
  V h, w;
};

// A patch of the scope for some channels or, without kernel offsets, a cell: what is sampled, or
// the sums of its gradient.
template <typename V, bool kKernel>
struct Patch {
  V value, by_w, by_h, by_both;

  template <typename T>
  DK_INLINE explicit Patch(const T* p)
      : value(load<V>(p)),
        by_w(load_once<V>(p + kChannelBlock)),
        by_h(load_once<V>(p + 2 * kChannelBlock)),
        by_both(load_once<V>(p + 3 * kChannelBlock)) {}
  template <typename T>
  DK_INLINE void store_to(T* p) const {
    store(p, value);
    store(p + kChannelBlock, by_w);
    store(p + 2 * kChannelBlock, by_h);
    store(p + 3 * kChannelBlock, by_both);
  }
  DK_INLINE V slope_h(const PatchLocation<V>& at) const { return by_h + at.w * by_both; }
  DK_INLINE V slope_w(const PatchLocation<V>& at) const { return by_w + at.h * by_both; }
  DK_INLINE V sample(const PatchLocation<V>& at) const {
    return value + at.w * by_w + at.h * slope_h(at);
  }
  // The transpose of sample.
  DK_INLINE void add(const PatchLocation<V>& at, const V& grad) {
    value += grad;
    by_w += at.w * grad;
    by_h += at.h * grad;
    by_both += at.h * at.w * grad;
  }
};

template <typename V>
struct Patch<V, false> {
  V value;

  template <typename T>
  DK_INLINE explicit Patch(const T* p) : value(load<V>(p)) {}
  template <typename T>
  DK_INLINE void store_to(T* p) const {
    store(p, value);
  }
  DK_INLINE V sample(const PatchLocation<V>&) const { return value; }
  DK_INLINE void add(const PatchLocation<V>&, const V& grad) { value += grad; }
};

// What the pixels of a tile read of the scope through tap t.
template <typename T, bool kKernel>
struct ScopeTap {
  const PatchTile<T>& tile;  // if kKernel
  int t;

  DK_INLINE int64_t patch(int i) const { return kKernel ? tile.patch[i] : t * kChannelBlock; }
  template <typename V>
  DK_INLINE PatchLocation<V> location(int i) const {
    if constexpr (kKernel)
      return {broadcast<V>(tile.h[i]), broadcast<V>(tile.w[i])};
    else
      return {V{}, V{}};
  }
};

// A block of the scope and the sums of its gradient, as taps read and add to them.
template <typename T, bool kKernel>
struct ScopeGradient {
  const ConvParams& p;
  Scratch<T> patches, grad_patches;
  const T* weight = nullptr;
  T* grad_weight = nullptr;

  explicit ScopeGradient(const ConvParams& p)
      : p(p), patches(kKernel ? patch_values(p) : 1), grad_patches(kKernel ? patch_values(p) : 1) {}
  DK_INLINE void start(const T* cells, T* grad_cells) {
    weight = cells;
    grad_weight = grad_cells;
    if constexpr (!kKernel) return;
    weight = make_patches(p, cells, patches.tiles);
    grad_weight = grad_patches.tiles;
    std::memset(grad_weight, 0, sizeof(T) * patch_values(p));
  }
  DK_INLINE void finish(T* grad_cells) {
    if constexpr (kKernel) add_patches(p, grad_patches.tiles, grad_cells);
  }
};

// ---- what taps read ----------------------------------------------------------------------------

// Images, of which a row of the other side needs `wanted` rows at most, later ones later rows. Of
// NCHW, those of a block of channels are laid out anew, each once, and kept while they are needed.
template <typename scalar_t>
struct ImageRows {
  const int64_t channels, height;
  const bool nchw;
  const Places places;
  const Scratch<scalar_t> copies;
  int64_t end = 0;  // of the rows that were copied

  ImageRows(int64_t channels, int64_t height, int64_t width, bool nchw, int64_t wanted)
      : channels(channels),
        height(height),
        nchw(nchw),
        places{nchw && wanted < height ? wanted : height, width,
               nchw && channels > kChannelBlock ? kChannelBlock : channels},
        copies(nchw ? places.kept * width * places.step : 1) {}

  // What the places of image n count from, for `count` channels from c on and the rows from `top`
  // to before `bottom`, some of which may be outside. `again`: another image or block than before.
  DK_INLINE const scalar_t* read(const scalar_t* images, int64_t n, int64_t c, int64_t count,
                                 int64_t top, int64_t bottom, bool again) {
    const int64_t width = places.width, plane = height * width;
    if (!nchw) return images + n * plane * channels + c;
    if (again) end = 0;
    if (end < top) end = top;
    for (; end < bottom && end < height; ++end) {
      for (int64_t x = 0; x < width; x += kTile) {
        const int pixels = static_cast<int>(width - x < kTile ? width - x : kTile);
        transpose(images + (n * channels + c) * plane + end * width + x, plane, count, pixels,
                  copies.tiles + places.row(end) + x * places.step, places.step);
      }
    }
    return copies.tiles;
  }
};

// ---- forward -----------------------------------------------------------------------------------

// Some neighbouring pixels: they mostly read the same patch, which is loaded once for them.
// kFactors: of kernel_offset.
template <typename scalar_t, bool kKernel, bool kData, bool kFactors>
struct ForwardPixels {
  using T = opmath_t<scalar_t>;
  const ConvParams& p;
  const PatchTile<T>* scope;  // per tap, if kKernel
  const ImageTile<T>* image;  // per tap, if kData
  const PixelTile* pixels;    // per tap, if not kData
  const T* weight;            // patches or, if not kKernel, cells
  const T* bias;              // null: none
  const scalar_t* input;      // of the image
  scalar_t* output;           // of the tile, whose pixels lie `stride` elements apart
  int64_t stride;
  int i, count;  // the first pixel in its tile, and pixels from there on

  static constexpr int P = kData ? 1 : 2;

  // The last pixel of a tile may be alone: it is its own neighbour then.
  DK_INLINE int pixel(int k) const { return k < count ? i + k : i; }

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V acc[P][U];
    for (int k = 0; k < P; ++k) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) acc[k][u] = bias ? load<V>(bias + c + u * L) : V{};
    }
    for (int t = 0; t < p.taps(); ++t) {
      if (together(t)) {
        add<V, U, P>(t, 0, c, acc);
        continue;
      }
      for (int k = 0; k < P; ++k) {
        if (padded(t, pixel(k)))
          add_padding<V, U>(t, pixel(k), acc[k]);
        else
          add<V, U, 1>(t, k, c, acc + k);
      }
    }
    for (int k = 0; k < P; ++k) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) store(output + pixel(k) * stride + c + u * L, acc[k][u]);
    }
  }

  DK_INLINE ScopeTap<T, kKernel> scope_tap(int t) const { return {scope[kKernel ? t : 0], t}; }

  DK_INLINE bool padded(int t, int i) const { return !kData && pixels[t].offset[i] < 0; }

  DK_INLINE bool together(int t) const {
    bool same = true;
    for (int k = 0; k < P; ++k) {
      same &= !padded(t, pixel(k)) && scope_tap(t).patch(pixel(k)) == scope_tap(t).patch(i);
    }
    return same;
  }

  // Tap t of n pixels from the first on, which read the same patch.
  template <typename V, int U, int n>
  DK_INLINE void add(int t, int first, int64_t c, V (*acc)[U]) const {
    constexpr int L = lanes<V, T>;
    const ScopeTap<T, kKernel> tap = scope_tap(t);
    const T* w = weight + tap.patch(pixel(first)) + c;
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const Patch<V, kKernel> patch(w + u * L);
      for (int k = 0; k < n; ++k) {
        const int at = pixel(first + k);
        V x = value_sampler<V>(t, at)(input + c + u * L);
        if constexpr (kFactors) x *= broadcast<V>(scope[t].factor[at]);
        acc[k][u] += x * patch.sample(tap.template location<V>(at));
      }
    }
  }

  // A tap in the padding adds 0, but a NaN of its offset still shows in the output, and so does an
  // infinite factor.
  template <typename V, int U>
  DK_INLINE void add_padding(int t, int i, V* acc) const {
    if constexpr (kKernel) {
      const T sum = scope[t].h[i] + scope[t].w[i] + 0 * scope[t].factor[i];
      if (sum == sum) return;
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) acc[u] += sum;
    }
  }

  template <typename V>
  DK_INLINE auto value_sampler(int t, int i) const {
    if constexpr (kData)
      return Cells<V, T, int64_t>(image[t], i);
    else
      return Cell<V>{pixels[t].offset[i]};
  }
};

template <bool kKernel, bool kData, bool kFactors, typename scalar_t>
DK_INLINE void forward_rows(const DepthwiseForward<scalar_t>& a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  using Pixels = ForwardPixels<scalar_t, kKernel, kData, kFactors>;
  const ConvParams& p = a.params;
  const int taps = p.taps();
  Scratch<PatchTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(kData ? taps : 1);
  Scratch<PixelTile> pixels(kData ? 1 : taps);
  Scratch<T> patches(kKernel ? patch_values(p) : 1);
  Scratch<scalar_t> planes(kTile * kChannelBlock);  // if nchw
  const int64_t stride = a.nchw ? kChannelBlock : p.channels;
  const int64_t wanted = (p.kernel_h - 1) * p.dilation_h + 1;
  ImageRows<scalar_t> rows(p.channels, p.in_h, p.in_w, a.nchw && !kData, wanted);
  int64_t column[kTile];
  for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
    const int64_t width = block_width(p, c);
    const T* weight = a.weight + c * p.cells();
    if constexpr (kKernel) weight = make_patches(p, weight, patches.tiles);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / p.out_h, row = line % p.out_h;
      const int64_t top = row * p.stride_h - p.pad_h;
      const bool again = line == begin || row == 0;
      const scalar_t* input = rows.read(a.input, n, c, width, top, top + wanted, again);
      for (int64_t x = 0; x < p.out_w; x += kTile) {
        const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
        scalar_t* output = a.nchw ? planes.tiles : a.output + (line * p.out_w + x) * p.channels + c;
        output_columns(x, count, column);
        for (int t = 0; t < taps; ++t) {
          if constexpr (kKernel)
            fill_patch_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
          if constexpr (kData)
            fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
          else
            fill_pixel_tile(p, t, row, column, rows.places, pixels.tiles[t]);
        }
        for (int i = 0; i < count; i += Pixels::P) {
          const Pixels some{p,           scope.tiles,
                            image.tiles, pixels.tiles,
                            weight,      a.bias ? a.bias + c : nullptr,
                            input,       output,
                            stride,      i,
                            count - i};
          for_channels<T, kGroup / Pixels::P>(0, width, some);
          for (int k = 0; k < Pixels::P && !a.nchw; ++k) {
            // The last tap's row is the one that the rows above have not read.
            if constexpr (!kData)
              prefetch<false>(input + pixels.tiles[taps - 1].offset[i + k] + kTile * p.channels);
            prefetch<true>(output + (kTile + i + k) * p.channels);
          }
        }
        if (a.nchw) {
          scalar_t* image = a.output + ((n * p.channels + c) * p.out_h + row) * p.out_w + x;
          transpose(planes.tiles, stride, count, width, image, p.out_h * p.out_w);
        }
      }
    }
  }
}

template <typename scalar_t>
void forward(const DepthwiseForward<scalar_t>& a, int64_t begin, int64_t end) {
  dispatch_offsets(a, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    if (kKernel && !kData && a.kernel_offset.modulated)
      forward_rows<kKernel, kData, kKernel && !kData>(a, begin, end);
    else
      forward_rows<kKernel, kData, false>(a, begin, end);
  });
}

// ---- backward, rigid data grid -----------------------------------------------------------------
//
// By input pixels: pixel q and tap t meet in the one output p = (q + pad - k_t * dilation) /
// stride, if that is on the stride grid. Every (p, t) is visited once, so x and grad_output are
// read once, and nothing is scattered. A tap is done for the whole tile, whose pixels read few
// patches through it: all of the patches and of their gradient are too much for the first-level
// cache.

// One tap of the pixels of a tile.
template <typename scalar_t, bool kKernel>
struct BackwardTap {
  using T = opmath_t<scalar_t>;
  const ConvParams& p;
  int64_t width;  // of the block of channels
  ScopeTap<T, kKernel> scope;
  const PixelTile& outputs;  // which they feed
  const T* weight;           // patches or, if not kKernel, cells
  const scalar_t* input;     // of the tile, whose pixels lie `stride` elements apart
  int64_t stride;
  const scalar_t* grad_output;  // of the image
  T* grad_input;                // [kTile, kChannelBlock]
  T* grad_weight;               // like weight
  DotTile<T>& dots;             // if kKernel

  // kFactors: of kernel_offset.
  template <bool kFactors>
  DK_INLINE void run(int count) const {
    int fed[kTile], n = 0;
    for (int i = 0; i < count; ++i) {
      if (outputs.offset[i] >= 0) fed[n++] = i;
    }
    for (int k = 0; k < n;) {
      if (k + 1 < n && scope.patch(fed[k]) == scope.patch(fed[k + 1])) {
        pixels<2, kFactors>(fed + k);
        k += 2;
      } else {
        pixels<1, kFactors>(fed + k);
        k += 1;
      }
    }
  }

  // P pixels that read the same patch.
  template <int P, bool kFactors>
  DK_INLINE void pixels(const int* i) const {
    typedef Vector<T> V;
    const int64_t vectors = width - width % lanes<V, T>;
    channels<V, P, kFactors>(i, 0, vectors);
    if (vectors < width) single_channels<P>(*this, i, vectors);
  }

  // The last channels, with factors always and in one copy: in two, the compiler vectorises, and
  // so rounds, the same sums differently. (By value, so that nothing else of the tap is in memory.)
  template <int P>
  __attribute__((noinline)) static void single_channels(BackwardTap tap, const int* i,
                                                        int64_t begin) {
    tap.template channels<T, P, kKernel>(i, begin, tap.width);
  }

  template <typename V, int P, bool kFactors>
  DK_INLINE void channels(const int* i, int64_t begin, int64_t end) const {
    const int64_t at = scope.patch(i[0]);
    V by_location[4] = {}, by_factor[4] = {};
    for (int64_t c = begin; c < end; c += lanes<V, T>) {
      const Patch<V, kKernel> patch(weight + at + c);
      Patch<V, kKernel> sums(grad_weight + at + c);
      for (int k = 0; k < P; ++k) {
        const PatchLocation<V> location = scope.template location<V>(i[k]);
        const V sample = patch.sample(location);
        V g = load<V>(grad_output + outputs.offset[i[k]] + c);
        const V x = load<V>(input + i[k] * stride + c);
        if constexpr (kFactors) {
          by_factor[k] += g * x * sample;
          g *= broadcast<V>(scope.tile.factor[i[k]]);
        }
        const V gx = g * x;
        sums.add(location, gx);
        add_to(grad_input + i[k] * kChannelBlock + c, g * sample);
        if constexpr (kKernel) {
          by_location[2 * k] += gx * patch.slope_h(location);
          by_location[2 * k + 1] += gx * patch.slope_w(location);
        }
      }
      sums.store_to(grad_weight + at + c);
    }
    if constexpr (kKernel) {
      T sums[4], factor_sums[4];
      sum_each<T>(by_location, sums);
      sum_each<T>(by_factor, factor_sums);
      for (int k = 0; k < P; ++k) {
        for (int j = 0; j < 2; ++j) dots.dot[i[k]][j] += sums[2 * k + j];
        dots.dot[i[k]][2] += factor_sums[k];
      }
    }
  }
};

template <bool kKernel, bool kFactors, typename scalar_t>
DK_INLINE void backward_rows(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,
                             opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int taps = p.taps();
  Scratch<T> grad_tile(kTile * kChannelBlock);
  Scratch<scalar_t> planes(kTile * kChannelBlock);  // if nchw
  const int64_t stride = a.nchw ? kChannelBlock : p.channels;
  ScopeGradient<T, kKernel> gradient(p);
  const int64_t wanted = (p.kernel_h - 1) * p.dilation_h / p.stride_h + 1;
  ImageRows<scalar_t> rows(p.channels, p.out_h, p.out_w, a.nchw, wanted);
  PatchTile<T> scope;
  PixelTile outputs;
  DotTile<T> dots;
  int64_t column[kTile];
  for (int64_t c = a.first_channel; c < a.last_channel; c += kChannelBlock) {
    const int64_t width = block_width(p, c), cells = (c - a.first_channel) * p.cells();
    gradient.start(a.weight + cells, grad_weight + cells);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / p.in_h, y = line % p.in_h;
      const int64_t bottom = (y + p.pad_h) / p.stride_h + 1, top = bottom - wanted;
      const bool again = line == begin || y == 0;
      const scalar_t* grad_output = rows.read(a.grad_output, n, c, width, top, bottom, again);
      // The first tap's row is the one that the rows above have not read.
      const int64_t new_row = fed_output(y, p.pad_h, 0, p.dilation_h, p.stride_h, p.out_h);
      for (int64_t x = 0; x < p.in_w; x += kTile) {
        const int count = static_cast<int>(p.in_w - x < kTile ? p.in_w - x : kTile);
        const int64_t first = a.nchw ? ((n * p.channels + c) * p.in_h + y) * p.in_w + x
                                     : (line * p.in_w + x) * p.channels + c;
        const scalar_t* input = a.nchw ? planes.tiles : a.input + first;
        if (a.nchw) transpose(a.input + first, p.in_h * p.in_w, width, count, planes.tiles, stride);
        const scalar_t* next = grad_output + (new_row * p.out_w + x + kTile) * p.channels;
        std::memset(grad_tile.tiles, 0, sizeof(T) * kTile * kChannelBlock);
        for (int t = 0; t < taps; ++t) {
          const int64_t row =
              fed_output(y, p.pad_h, t / p.kernel_w, p.dilation_h, p.stride_h, p.out_h);
          if (row < 0) continue;
          fed_columns(p, x, count, t % p.kernel_w, column);
          const int64_t start = rows.places.row(row);
          for (int i = 0; i < kTile; ++i)
            outputs.offset[i] = column[i] < 0 ? -1 : start + column[i] * rows.places.step;
          if constexpr (kKernel) {
            fill_patch_tile(p, a.kernel_offset, n, t, row, column, scope);
            clear(&dots, 1);
          }
          const BackwardTap<scalar_t, kKernel> tap{
              p,     width,  {scope, t},  outputs,         gradient.weight,
              input, stride, grad_output, grad_tile.tiles, gradient.grad_weight,
              dots};
          tap.template run<kFactors>(count);
          if constexpr (kKernel) {
            add_kernel_offset_gradient(a, n, t, row, column, scope, dots, c + width == p.channels);
          }
          // Of the next tile.
          for (int i = t; i < count && !a.nchw; i += taps) {
            prefetch<false>(next + i * p.channels);
            prefetch<false>(a.input + first + (kTile + i) * p.channels);
            prefetch<true>(grad_input + first + (kTile + i) * p.channels);
          }
        }
        if (a.nchw) {
          transpose(grad_tile.tiles, kChannelBlock, count, width, grad_input + first,
                    p.in_h * p.in_w);
          continue;
        }
        for (int i = 0; i < count; ++i) {
          convert(grad_tile.tiles + i * kChannelBlock, grad_input + first + i * p.channels, width);
        }
      }
    }
    gradient.finish(grad_weight + cells);
  }
}

template <typename scalar_t>
void backward(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,
              opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end) {
  if (a.kernel_offset.modulated)
    backward_rows<true, true>(a, grad_input, grad_weight, begin, end);
  else if (a.kernel_offset.data)
    backward_rows<true, false>(a, grad_input, grad_weight, begin, end);
  else
    backward_rows<false, false>(a, grad_input, grad_weight, begin, end);
}

// ---- backward, deformed data grid --------------------------------------------------------------

// One tap of one output pixel: gradients of weight and offsets. dots[0]: of the data, [1]: of the
// kernel.
template <typename scalar_t, bool kKernel>
struct BackwardDataOffsetTap {
  using T = opmath_t<scalar_t>;
  ScopeTap<T, kKernel> scope;
  const ImageTile<T>& image;
  int i;                  // the pixel in its tile
  const T* weight;        // patches or, if not kKernel, cells
  const scalar_t* input;  // of the image
  const scalar_t* grad_output;
  T* grad_weight;  // like weight

  template <typename V>
  DK_INLINE auto cells() const {
    return std::make_pair(Cells<V, T, int64_t>(image, i), scope.template location<V>(i));
  }

  template <typename V, typename Pair>
  DK_INLINE void run(int64_t c, const Pair& cells, V (&dots)[2][4]) const {
    const auto& [data, location] = cells;
    const int64_t at = scope.patch(i) + c;
    const Patch<V, kKernel> patch(weight + at);
    Patch<V, kKernel> sums(grad_weight + at);
    const V g = load<V>(grad_output + c);
    V pixels[4];
    const V gx = g * data.sample(input + c, pixels);
    const V gw = g * patch.sample(location);
    sums.add(location, gx);
    sums.store_to(grad_weight + at);
    for (int j = 0; j < 4; ++j) dots[0][j] += gw * pixels[j];
    if constexpr (kKernel) {
      dots[1][0] += gx * patch.slope_h(location);
      dots[1][1] += gx * patch.slope_w(location);
    }
  }
};

// `count` pixels of a tile, from the tap's on, `step` elements apart. (Not inlined: beside the
// scratch memory below, which an error would have to free, what this loop holds is not kept in
// registers, and it takes a third longer.)
template <typename scalar_t, bool kKernel>
__attribute__((noinline)) void sum_tile(BackwardDataOffsetTap<scalar_t, kKernel> tap, int count,
                                        int64_t step, int64_t width,
                                        DotTile<opmath_t<scalar_t>>* const (&dots)[2]) {
  for (; tap.i < count; ++tap.i, tap.grad_output += step)
    sum_channels<opmath_t<scalar_t>, 2>(width, tap, dots, tap.i);
}

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_data_offset_rows(const DepthwiseBackward<scalar_t>& a,
                                         opmath_t<scalar_t>* grad_weight, int64_t begin,
                                         int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int taps = p.taps();
  Scratch<PatchTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(taps);
  Scratch<DotTile<T>> kernel_dots(kKernel ? taps : 1), data_dots(taps);
  ScopeGradient<T, kKernel> gradient(p);
  int64_t column[kTile];
  for (int64_t c = a.first_channel; c < a.last_channel; c += kChannelBlock) {
    const int64_t width = block_width(p, c), cells = (c - a.first_channel) * p.cells();
    const bool last = c + width == p.channels;
    gradient.start(a.weight + cells, grad_weight + cells);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / p.out_h, row = line % p.out_h;
      const scalar_t* input = a.input + n * p.in_h * p.in_w * p.channels + c;
      for (int64_t x = 0; x < p.out_w; x += kTile) {
        const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
        output_columns(x, count, column);
        for (int t = 0; t < taps; ++t) {
          fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
          if constexpr (kKernel)
            fill_patch_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
        }
        clear(data_dots.tiles, taps);
        if constexpr (kKernel) clear(kernel_dots.tiles, taps);
        // A tap for the whole tile before the next, as above.
        for (int t = 0; t < taps; ++t) {
          sum_tile<scalar_t, kKernel>(
              {{scope.tiles[kKernel ? t : 0], t},
               image.tiles[t],
               /*i=*/0,
               gradient.weight,
               input,
               a.grad_output + (line * p.out_w + x) * p.channels + c,
               gradient.grad_weight},
              count, p.channels, width,
              {&data_dots.tiles[t], kKernel ? &kernel_dots.tiles[t] : nullptr});
        }
        for (int t = 0; t < taps; ++t) {
          add_data_offset_gradient(a, n, t, row, column, image.tiles[t], data_dots.tiles[t]);
          if constexpr (kKernel)
            add_kernel_offset_gradient(a, n, t, row, column, scope.tiles[t], kernel_dots.tiles[t],
                                       last);
        }
      }
    }
    gradient.finish(grad_weight + cells);
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
  const PatchTile<T>* scope;  // per tap, if kKernel
  const ImageTile<T>* image;  // per tap
  const T* weight;            // patches or, if not kKernel, cells
  const scalar_t* grad_output;
  T* grad_input;  // of the image
  int i;          // the pixel in its tile

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V g[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) g[u] = load<V>(grad_output + c + u * L);
    for (int t = 0; t < taps; ++t) {
      const ScopeTap<T, kKernel> tap{scope[kKernel ? t : 0], t};
      const auto location = tap.template location<V>(i);
      const Cells<V, T, int64_t> data(image[t], i);
      V grad[U];
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Patch<V, kKernel> patch(weight + tap.patch(i) + c + u * L);
        grad[u] = g[u] * patch.sample(location);
      }
      for (int j = 0; j < 4; ++j) {
        if (image[t].coef[j][i] == T(0)) continue;  // outside the image: its cell is not its own
        T* to = grad_input + data.cell[j] + c;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) add_to<V>(to + u * L, data.coef[j] * grad[u]);
      }
    }
  }
};

template <bool kKernel, typename scalar_t>
DK_INLINE void backward_data_block(const DepthwiseBackward<scalar_t>& a,
                                   opmath_t<scalar_t>* grad_input, int64_t n, int64_t block) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int taps = p.taps();
  Scratch<PatchTile<T>> scope(kKernel ? taps : 1);
  Scratch<ImageTile<T>> image(taps);
  Scratch<T> patches(kKernel ? patch_values(p) : 1);
  int64_t column[kTile];
  const int64_t c = block * kChannelBlock;
  const T* weight = a.weight + c * p.cells();
  if constexpr (kKernel) weight = make_patches(p, weight, patches.tiles);
  for (int64_t row = 0; row < p.out_h; ++row) {
    for (int64_t x = 0; x < p.out_w; x += kTile) {
      const int count = static_cast<int>(p.out_w - x < kTile ? p.out_w - x : kTile);
      output_columns(x, count, column);
      for (int t = 0; t < taps; ++t) {
        fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
        if constexpr (kKernel)
          fill_patch_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
      }
      for (int i = 0; i < count; ++i) {
        const BackwardDataPixel<scalar_t, kKernel> pixel{
            taps,
            scope.tiles,
            image.tiles,
            weight,
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

template void forward(const DepthwiseForward<DK_TYPE>&, int64_t, int64_t);
template void backward(const DepthwiseBackward<DK_TYPE>&, DK_TYPE*, opmath_t<DK_TYPE>*, int64_t,
                       int64_t);
template void backward_data_offset(const DepthwiseBackward<DK_TYPE>&, opmath_t<DK_TYPE>*, int64_t,
                                   int64_t);
template void backward_data(const DepthwiseBackward<DK_TYPE>&, opmath_t<DK_TYPE>*, int64_t,
                            int64_t);

}  // namespace DK_ISA
}  // namespace dk

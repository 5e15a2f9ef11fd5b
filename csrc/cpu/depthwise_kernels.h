// The depthwise kernels. Included once per instruction set: tiles.h.
//
// Each pixel of a tile runs over its channels in groups of up to kGroup vectors. A block of
// channels is done for the whole tile before the next, so that its scope (S_h*S_w*kChannelBlock
// values, next to each other: at the distance of all channels, often a power of two, they would
// evict each other) stays in the first-level cache.
#include "tiles.h"

namespace dk {
namespace DK_ISA {

// ---- forward -----------------------------------------------------------------------------------
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
  const ConvParams& p = a.params;
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
  dispatch_offsets(a, [&](auto kernel, auto data) {
    forward_rows<decltype(kernel)::value, decltype(data)::value>(a, begin, end);
  });
}

// ---- backward, rigid data grid -----------------------------------------------------------------
//
// By input pixels: pixel q and tap t meet in the one output p = (q + pad - k_t * dilation) /
// stride, if that is on the stride grid. Every (p, t) is visited once, so x and grad_output are
// read once, grad_input and grad_kernel_offset are written once, and nothing is scattered.

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
  const ConvParams& p = a.params;
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
  const ConvParams& p = a.params;
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
  const ConvParams& p = a.params;
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

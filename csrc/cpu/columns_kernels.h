// The columns of convolutions that are not depthwise, and what becomes of their gradients: dense.h
// has the formula, dense_kernels.h the matrix products. Included once per instruction set: tiles.h.
//
// Columns have the order [chunks of C][cells][channels of a chunk], which a vector holds: a tap is
// added to four vectors, and its gradient read from four. It is not that of the weight, [C, cells],
// which is rearranged as it is packed for the products, and its gradient once it is summed up.
#include "tiles.h"

namespace dk {
namespace DK_ISA {

DK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The type that holds the channels of a chunk.
template <typename V>
struct Chunk {
  using type = V;
};

// Calls f(Chunk): of the longest vector whose channels divide a group's, or of a single channel.
template <typename T, typename V = Vector<T>, typename F>
DK_INLINE void dispatch_chunks(const ConvParams& p, const F& f) {
  constexpr int L = lanes<V, T>;
  if (p.channels / p.groups % L == 0) return f(Chunk<V>());
  if constexpr (L > 4)
    dispatch_chunks<T, typename VectorOf<T, sizeof(V) / 2>::type>(p, f);
  else
    f(Chunk<T>());
}

template <typename T>
DK_INLINE int64_t chunk_channels(const ConvParams& p) {
  int64_t channels = 0;
  dispatch_chunks<T>(p, [&](auto chunk) { channels = lanes<typename decltype(chunk)::type, T>; });
  return channels;
}

// ---- pixels of a tile --------------------------------------------------------------------------

// Where the taps of neighbouring pixels of a row read.
template <typename scalar_t, bool kKernel, bool kData>
struct Taps {
  using T = opmath_t<scalar_t>;
  Scratch<ScopeTile<T>> scope;
  Scratch<ImageTile<T>> image;
  Scratch<PixelTile> pixels;
  int64_t n, row, column[kTile];
  int count;

  explicit Taps(int taps) : scope(kKernel ? taps : 1), image(kData ? taps : 1), pixels(taps) {}

  // Those from pixel `first` on, up to `end`, the row's end, or a whole tile of taps. Cells of the
  // scope lie `step` apart. (Inlined for each chunk, it would take GCC many minutes.)
  __attribute__((noinline)) void fill(const Columns<scalar_t>& a, int64_t first, int64_t end,
                                      int step) {
    const ConvParams& p = a.params;
    const int64_t line = first / p.out_w, x = first % p.out_w;
    const int64_t left = p.out_w - x < end - first ? p.out_w - x : end - first;
    n = line / p.out_h;
    row = line % p.out_h;
    count = static_cast<int>(left < kTile ? left : kTile);
    output_columns(x, count, column);
    for (int t = 0; t < p.taps(); ++t) {
      if constexpr (kKernel)
        fill_scope_tile(p, a.kernel_offset, n, t, row, column, step, scope.tiles[t]);
      if constexpr (kData)
        fill_image_tile(p, a.data_offset, n, t, row, column, image.tiles[t]);
      else
        fill_pixel_tile(p, t, row, column, {p.in_h, p.in_w, p.channels}, pixels.tiles[t]);
    }
  }
  DK_INLINE bool in_padding(int t, int i) const { return !kData && pixels.tiles[t].offset[i] < 0; }
  template <typename V>
  DK_INLINE auto value_sampler(int t, int i) const {
    if constexpr (kData)
      return Cells<V, T, int64_t>(image.tiles[t], i);
    else
      return Cell<V>{pixels.tiles[t].offset[i]};
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <typename V, typename T>
DK_INLINE void add_to_cells(const Cells<V, T, int>& scope, const V& x, T* cells) {
  for (int j = 0; j < 4; ++j) add_to<V>(cells + scope.cell[j], scope.coef[j] * x);
}

template <typename V, typename T>
DK_INLINE void add_to_cells(const Cell<V>& scope, const V& x, T* cells) {
  add_to<V>(cells + scope.cell, x);
}

// Of channels [c, c + width) and pixels [first, end): to[pixel][width * cells], rows `row` apart.
// (A function of its own, like its counterpart below: inlined, its sums would not be registers.)
template <typename V, typename scalar_t, bool kKernel, bool kData>
__attribute__((noinline)) void columns_of(const Columns<scalar_t>& a, int64_t c, int64_t width,
                                          int64_t first, int64_t end, opmath_t<scalar_t>* to,
                                          int64_t row) {
  using T = opmath_t<scalar_t>;
  constexpr int L = lanes<V, T>;
  const ConvParams& p = a.params;
  const int64_t cells = p.cells();
  Taps<scalar_t, kKernel, kData> taps(p.taps());
  for (; first < end; first += taps.count) {
    taps.fill(a, first, end, L);
    const scalar_t* input = a.input + taps.n * p.in_h * p.in_w * p.channels + c;
    for (int i = 0; i < taps.count; ++i, to += row) {
      std::memset(to, 0, sizeof(T) * width * cells);
      for (int t = 0; t < p.taps(); ++t) {
        const bool padding = taps.in_padding(t, i);  // zeros, which a NaN coefficient makes NaN
        const auto data = taps.template value_sampler<V>(t, i);
        const auto scope = scope_sampler<V, kKernel>(taps.scope.tiles, t, i, L);
        for (int64_t k = 0; k < width; k += L) {
          V x{};
          if (!padding) x = data(input + k);
          add_to_cells(scope, x, to + k * cells);
        }
      }
    }
  }
}

template <typename scalar_t>
DK_INLINE void fill_columns(const Columns<scalar_t>& a, int64_t c, int64_t width, int64_t first,
                            int64_t end, opmath_t<scalar_t>* to, int64_t row) {
  dispatch_chunks<opmath_t<scalar_t>>(a.params, [&](auto chunk) {
    dispatch_offsets(a, [&](auto kernel, auto data) {
      columns_of<typename decltype(chunk)::type, scalar_t, decltype(kernel)::value,
                 decltype(data)::value>(a, c, width, first, end, to, row);
    });
  });
}

// ---- backward ----------------------------------------------------------------------------------

template <typename V, typename T>
DK_INLINE void add_dots(const V (&dots)[4], DotTile<T>& tile, int i) {
  T sums[4];
  sum_each<T>(dots, sums);
  for (int j = 0; j < 4; ++j) tile.dot[i][j] += sums[j];
}

// One tap of one output pixel: the gradient of what it reads, and of its offsets.
template <typename V, bool kKernel, bool kData, typename Data, typename Scope, typename scalar_t,
          typename T>
DK_INLINE V tap_gradient(const Data& data, const Scope& scope, const scalar_t* input,
                         const T* grad_cells, V (&data_dots)[4], V (&kernel_dots)[4]) {
  V x{}, pixels[4], grads[4], grad;
  if constexpr (kData)
    x = data.sample(input, pixels);
  else if constexpr (kKernel)
    x = data(input);
  if constexpr (kKernel) {
    grad = scope.sample(grad_cells, grads);
    for (int j = 0; j < 4; ++j) kernel_dots[j] += x * grads[j];
  } else {
    grad = scope(grad_cells);
  }
  if constexpr (kData) {
    for (int j = 0; j < 4; ++j) data_dots[j] += grad * pixels[j];
  }
  return grad;
}

// Of the pixels of a tile; `last`: all channels have been summed. (Not inlined: as Taps::fill.)
template <typename scalar_t, bool kKernel, bool kData, typename Dots>
__attribute__((noinline)) void add_offset_gradients(const DenseBackward<scalar_t>& a,
                                                    const Taps<scalar_t, kKernel, kData>& taps,
                                                    const Dots* kernel_dots, const Dots* data_dots,
                                                    bool last) {
  for (int t = 0; t < a.params.taps(); ++t) {
    if constexpr (kKernel)
      add_kernel_offset_gradient(a, taps.n, t, taps.row, taps.column, taps.scope.tiles[t],
                                 kernel_dots[t], last);
    if constexpr (kData)
      add_data_offset_gradient(a, taps.n, t, taps.row, taps.column, taps.image.tiles[t],
                               data_dots[t]);
  }
}

// Of channels [c, c + width) and pixels [first, end), whose gradient of columns is grad_columns
// [pixel][width * cells], rows `row` apart.
template <typename V, typename scalar_t, bool kKernel, bool kData>
__attribute__((noinline)) void columns_backward_of(const DenseBackward<scalar_t>& a, int64_t c,
                                                   int64_t width, int64_t first, int64_t end,
                                                   const opmath_t<scalar_t>* grad_columns,
                                                   int64_t row) {
  using T = opmath_t<scalar_t>;
  constexpr int L = lanes<V, T>;
  const ConvParams& p = a.params;
  const int64_t cells = p.cells();
  const int count = p.taps();
  Taps<scalar_t, kKernel, kData> taps(count);
  Scratch<DotTile<T>> kernel_dots(kKernel ? count : 1), data_dots(kData ? count : 1);
  for (; first < end; first += taps.count) {
    taps.fill(a, first, end, L);
    if constexpr (kKernel) clear(kernel_dots.tiles, count);
    if constexpr (kData) clear(data_dots.tiles, count);
    const scalar_t* input = a.input + taps.n * p.in_h * p.in_w * p.channels + c;
    for (int i = 0; i < taps.count; ++i, grad_columns += row) {
      T* grad_taps = a.grad_taps + (first + i - a.first) * count * p.channels + c;
      for (int t = 0; t < count; ++t, grad_taps += p.channels) {
        if (taps.in_padding(t, i)) continue;
        const auto data = taps.template value_sampler<V>(t, i);
        const auto scope = scope_sampler<V, kKernel>(taps.scope.tiles, t, i, L);
        V data_sums[4] = {}, kernel_sums[4] = {};
        for (int64_t k = 0; k < width; k += L) {
          store(grad_taps + k,
                tap_gradient<V, kKernel, kData>(data, scope, input + k, grad_columns + k * cells,
                                                data_sums, kernel_sums));
        }
        if constexpr (kData) add_dots(data_sums, data_dots.tiles[t], i);
        if constexpr (kKernel) add_dots(kernel_sums, kernel_dots.tiles[t], i);
      }
    }
    add_offset_gradients(a, taps, kernel_dots.tiles, data_dots.tiles, c + width == p.channels);
  }
}

template <typename scalar_t>
DK_INLINE void columns_backward(const DenseBackward<scalar_t>& a, int64_t c, int64_t width,
                                int64_t first, int64_t end, const opmath_t<scalar_t>* grad_columns,
                                int64_t row) {
  dispatch_chunks<opmath_t<scalar_t>>(a.params, [&](auto chunk) {
    dispatch_offsets(a, [&](auto kernel, auto data) {
      columns_backward_of<typename decltype(chunk)::type, scalar_t, decltype(kernel)::value,
                          decltype(data)::value>(a, c, width, first, end, grad_columns, row);
    });
  });
}

// One input pixel: the sum of the taps that read it.
template <typename T>
struct AddTaps {
  const T* const* taps;
  int count;
  T* grad_input;

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    constexpr int L = lanes<V, T>;
    V sum[U];
    for (int u = 0; u < U; ++u) sum[u] = load<V>(grad_input + c + u * L);
    for (int t = 0; t < count; ++t) {
      for (int u = 0; u < U; ++u) sum[u] += load<V>(taps[t] + c + u * L);
    }
    for (int u = 0; u < U; ++u) store(grad_input + c + u * L, sum[u]);
  }
};

template <typename scalar_t>
void add_taps(const DenseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input, int64_t begin,
              int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  Scratch<const T*> taps(p.taps());
  Scratch<int64_t> rows(p.kernel_h), columns(p.kernel_w * p.in_w);  // -1: none
  for (int j = 0; j < p.kernel_w; ++j) {
    for (int64_t x = 0; x < p.in_w; ++x)
      columns.tiles[j * p.in_w + x] = fed_output(x, p.pad_w, j, p.dilation_w, p.stride_w, p.out_w);
  }
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / p.in_h, y = line % p.in_h;
    for (int i = 0; i < p.kernel_h; ++i)
      rows.tiles[i] = fed_output(y, p.pad_h, i, p.dilation_h, p.stride_h, p.out_h);
    for (int64_t x = 0; x < p.in_w; ++x) {
      int count = 0;
      // In the order of the output pixels: what tile they are in does not change the sum.
      for (int i = p.kernel_h - 1; i >= 0; --i) {
        if (rows.tiles[i] < 0) continue;
        const int64_t first = (n * p.out_h + rows.tiles[i]) * p.out_w - a.first;
        for (int j = p.kernel_w - 1; j >= 0; --j) {
          const int64_t column = columns.tiles[j * p.in_w + x], pixel = first + column;
          if (column < 0 || pixel < 0 || pixel >= a.count) continue;
          const int64_t tap = pixel * p.taps() + i * p.kernel_w + j;
          taps.tiles[count++] = a.grad_taps + tap * p.channels;
        }
      }
      if (!count) continue;
      const AddTaps<T> body{taps.tiles, count, grad_input + (line * p.in_w + x) * p.channels};
      for_channels<T, kGroup>(0, p.channels, body);
    }
  }
}

// One tap of one output pixel, to its four pixels of the image.
template <typename T>
struct ScatterTap {
  const ImageTile<T>& image;
  int i;  // the pixel in its tile
  const T* grad_tap;
  T* grad_input;  // of the image

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    const Cells<V, T, int64_t> data(image, i);
    const V grad = load<V>(grad_tap + c);
    for (int j = 0; j < 4; ++j) {
      if (image.coef[j][i] == T(0)) continue;  // outside the image: its cell is not its own
      add_to<V>(grad_input + data.cell[j] + c, data.coef[j] * grad);
    }
  }
};

template <typename scalar_t>
void scatter_taps(const DenseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input, int64_t begin,
                  int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  Taps<scalar_t, false, true> taps(p.taps());
  for (int64_t pixel = 0; pixel < a.count; pixel += taps.count) {
    taps.fill(a, a.first + pixel, a.first + a.count, /*step=*/0);
    for (int i = 0; i < taps.count; ++i) {
      for (int t = 0; t < p.taps(); ++t) {
        const ScatterTap<T> tap{taps.image.tiles[t], i,
                                a.grad_taps + ((pixel + i) * p.taps() + t) * p.channels,
                                grad_input + taps.n * p.in_h * p.in_w * p.channels};
        for_channels<T, 1>(begin, end, tap);
      }
    }
  }
}

}  // namespace DK_ISA
}  // namespace dk

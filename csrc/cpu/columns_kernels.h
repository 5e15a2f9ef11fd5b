// The columns of convolutions that are not depthwise, and what becomes of their gradients: dense.h
// has the formula, dense_kernels.h the matrix products. Included once per instruction set: tiles.h.
//
// Columns have the layout of the weight, [C, cells], which needs no rearranging then. Forward, a
// pixel's taps make a dense table of coefficients, [taps, cells], and each channel is a sum of its
// rows: all cells of a channel lie in registers. Backward reads four cells a tap and is vectorised
// over channels, which a transposition of each block puts next to each other.
#include "tiles.h"

namespace dk {
namespace DK_ISA {

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

  // Those from pixel `first` on, up to `end`, the row's end, or a whole tile of taps.
  DK_INLINE void fill(const Columns<scalar_t>& a, int64_t first, int64_t end) {
    const ConvParams& p = a.params;
    const int64_t line = first / p.out_w, x = first % p.out_w;
    const int64_t left = p.out_w - x < end - first ? p.out_w - x : end - first;
    n = line / p.out_h;
    row = line % p.out_h;
    count = static_cast<int>(left < kTile ? left : kTile);
    output_columns(x, count, column);
    for (int t = 0; t < p.taps(); ++t) {
      if constexpr (kKernel) fill_scope_tile(p, a.kernel_offset, n, t, row, column, scope.tiles[t]);
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

// A tap of a block of channels, in the arithmetic type.
template <typename scalar_t, typename Sampler, typename ScalarSampler>
struct SampleRow {
  using T = opmath_t<scalar_t>;
  const Sampler& vector;
  const ScalarSampler& single;
  const scalar_t* input;
  T* to;

  template <typename V, int U>
  DK_INLINE void run(int64_t c) const {
    if constexpr (sizeof(V) == sizeof(T))
      store(to + c, single(input + c));
    else
      store(to + c, vector(input + c));
  }
};

// What each tap of a pixel reads, [taps][kChannelBlock].
template <typename T>
struct TapRows {
  Scratch<const T*> rows;
  Scratch<T[kChannelBlock]> values;
  alignas(64) T padding[kChannelBlock] = {};

  explicit TapRows(int taps) : rows(taps), values(taps) {}

  template <typename scalar_t, bool kKernel, bool kData>
  DK_INLINE void fill(const Taps<scalar_t, kKernel, kData>& taps, int count, int i,
                      const scalar_t* input, int64_t width) {
    for (int t = 0; t < count; ++t) {
      if (taps.in_padding(t, i)) {
        rows.tiles[t] = padding;
      } else if constexpr (!kData && std::is_same_v<scalar_t, T>) {
        rows.tiles[t] = input + taps.pixels.tiles[t].offset[i];
      } else {
        const auto vector = taps.template value_sampler<Vector<T>>(t, i);
        const auto single = taps.template value_sampler<T>(t, i);
        const SampleRow<scalar_t, decltype(vector), decltype(single)> row{vector, single, input,
                                                                          values.tiles[t]};
        for_channels<T, 1>(0, width, row);
        rows.tiles[t] = values.tiles[t];
      }
    }
  }
};

// Cells that are summed up at once: one or two vectors of them.
template <typename T>
DK_INLINE int cell_step(int cells) {
  constexpr int L = lanes<Vector<T>, T>;
  return cells <= 4 ? 4 : cells <= L ? L : 2 * L;
}

template <typename T>
DK_INLINE int padded_cells(int cells) {
  const int step = cell_step<T>(cells);
  return (cells + step - 1) / step * step;
}

// The coefficients of the taps of a pixel on the cells, [taps][stride], zero beyond the cells.
template <typename T>
struct CoefficientTable {
  int taps;
  int64_t stride;
  Scratch<T> values;

  CoefficientTable(int taps, int cells)
      : taps(taps),
        // Whole vectors, and whole steps: two doubles are a vector, but four cells a step.
        stride(padded_cells<T>(cells) > lanes<Vector<T>, T> ? padded_cells<T>(cells)
                                                            : lanes<Vector<T>, T>),
        values(taps * stride) {
    std::memset(values.tiles, 0, sizeof(T) * taps * stride);
    // For want of kernel offsets, each tap has a cell of its own.
    for (int t = 0; t < taps && t < cells; ++t) values.tiles[t * stride + t] = 1;
  }
  // By comparing every cell: a vector read of single numbers just written would have to wait for
  // them.
  DK_INLINE void fill(const ScopeTile<T>* scope, int i) {
    typedef Vector<T> V;
    using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    typedef Like<Integer, T> I;
    I lane;
    for (int l = 0; l < lanes<V, T>; ++l) lane[l] = l * kChannelBlock;
    for (int t = 0; t < taps; ++t) {
      for (int64_t cell = 0; cell < stride; cell += lanes<V, T>) {
        V sum{};
        for (int j = 0; j < 4; ++j) {
          const Integer at = scope[t].cell[j][i] - static_cast<Integer>(cell * kChannelBlock);
          sum += lane == at ? broadcast<V>(scope[t].coef[j][i]) : V{};
        }
        store(values.tiles + t * stride + cell, sum);
      }
    }
  }
};

// Channels of one pixel: to[c][cell] = sum over taps of rows[t][c] * table[t][cell].
template <typename T>
struct Expand {
  const T* const* rows;
  const CoefficientTable<T>& table;
  int cells;

  // U channels, NV vectors of their cells from `cell` on, which the first has at `to`.
  template <typename V, int U, int NV>
  DK_INLINE void block(int64_t c, int cell, T* to) const {
    constexpr int L = lanes<V, T>;
    V acc[U][NV] = {};
    for (int t = 0; t < table.taps; ++t) {
      V coef[NV];
      for (int v = 0; v < NV; ++v)
        coef[v] = load<V>(table.values.tiles + t * table.stride + cell + v * L);
      const T* row = rows[t] + c;
      asm("" : "+r"(row));  // or GCC keeps a register for the distance to each channel
      for (int u = 0; u < U; ++u) {
        const V x = broadcast<V>(row[u]);
        for (int v = 0; v < NV; ++v) acc[u][v] += x * coef[v];
      }
    }
    for (int u = 0; u < U; ++u) {
      for (int v = 0; v < NV; ++v) store(to + u * cells + v * L, acc[u][v]);
    }
  }

  // All cells of a channel are written by whole vectors: what they write too much belongs to the
  // next channels, which are written later. The last ones, which have no such neighbours, take a
  // detour.
  template <typename V, int NV>
  DK_INLINE void channels(int64_t width, T* to) const {
    constexpr int step = NV * lanes<V, T>, U = kGroup * 2 / NV;
    const int padded = padded_cells<T>(cells);
    const int64_t safe = width - (padded - 1) / cells;
    int64_t c = 0;
    if (padded == step) {
      for (; c + U <= safe; c += U, to += U * cells) block<V, U, NV>(c, 0, to);
    }
    for (; c < safe; ++c, to += cells) {
      for (int cell = 0; cell < padded; cell += step) block<V, 1, NV>(c, cell, to + cell);
    }
    T detour[step];
    for (; c < width; ++c, to += cells) {
      for (int cell = 0; cell < cells; cell += step) {
        block<V, 1, NV>(c, cell, detour);
        const int count = cells - cell < step ? cells - cell : step;
        std::memcpy(to + cell, detour, sizeof(T) * count);
      }
    }
  }

  DK_INLINE void run(int64_t width, T* to) const {
    typedef Vector<T> V;
    typedef typename VectorOf<T, 4 * sizeof(T)>::type Quad;
    if (cells <= 4)
      channels<Quad, 1>(width, to);
    else if (cells <= lanes<V, T>)
      channels<V, 1>(width, to);
    else
      channels<V, 2>(width, to);
  }
};

// Of channels [c, c + width) and pixels [first, end): to[pixel][width * cells], rows `row` apart.
template <typename scalar_t, bool kKernel, bool kData>
DK_INLINE void columns_of(const Columns<scalar_t>& a, int64_t c, int64_t width, int64_t first,
                          int64_t end, opmath_t<scalar_t>* to, int64_t row) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  Taps<scalar_t, kKernel, kData> taps(p.taps());
  TapRows<T> rows(p.taps());
  CoefficientTable<T> table(p.taps(), p.cells());
  const Expand<T> expand{rows.rows.tiles, table, p.cells()};
  for (; first < end; first += taps.count) {
    taps.fill(a, first, end);
    const scalar_t* input = a.input + taps.n * p.in_h * p.in_w * p.channels + c;
    for (int i = 0; i < taps.count; ++i, to += row) {
      if constexpr (kKernel) table.fill(taps.scope.tiles, i);
      rows.fill(taps, p.taps(), i, input, width);
      expand.run(width, to);
    }
  }
}

template <typename scalar_t>
DK_INLINE void fill_columns(const Columns<scalar_t>& a, int64_t c, int64_t width, int64_t first,
                            int64_t end, opmath_t<scalar_t>* to, int64_t row) {
  dispatch_offsets(a, [&](auto kernel, auto data) {
    columns_of<scalar_t, decltype(kernel)::value, decltype(data)::value>(a, c, width, first, end,
                                                                         to, row);
  });
}

// ---- backward ----------------------------------------------------------------------------------

// One tap of one output pixel: the gradient of what it reads, and of its offsets. dots[0]: of the
// data, [1]: of the kernel.
template <typename scalar_t, bool kKernel, bool kData>
struct ColumnsBackwardTap {
  using T = opmath_t<scalar_t>;
  const Taps<scalar_t, kKernel, kData>& taps;
  int t, i;
  const T* grad_columns;  // [cells][kChannelBlock]
  const scalar_t* input;  // of the image
  T* grad_tap;

  template <typename V>
  DK_INLINE auto cells() const {
    return std::make_pair(taps.template value_sampler<V>(t, i),
                          scope_sampler<V, kKernel>(taps.scope.tiles, t, i));
  }

  template <typename V, typename Pair>
  DK_INLINE void run(int64_t c, const Pair& cells, V (&dots)[2][4]) const {
    const auto& data = cells.first;
    const auto& scope = cells.second;
    V x{}, pixels[4], grads[4];
    if constexpr (kData)
      x = data.sample(input + c, pixels);
    else if constexpr (kKernel)
      x = data(input + c);
    V grad;
    if constexpr (kKernel) {
      grad = scope.sample(grad_columns + c, grads);
      for (int j = 0; j < 4; ++j) dots[1][j] += x * grads[j];
    } else {
      grad = scope(grad_columns + c);
    }
    store(grad_tap + c, grad);
    if constexpr (kData) {
      for (int j = 0; j < 4; ++j) dots[0][j] += grad * pixels[j];
    }
  }
};

// Of channels [c, c + width) and pixels [first, end), whose gradient of columns is grad_columns
// [pixel][width, cells], rows `row` apart.
template <typename scalar_t, bool kKernel, bool kData>
DK_INLINE void columns_backward_of(const DenseBackward<scalar_t>& a, int64_t c, int64_t width,
                                   int64_t first, int64_t end,
                                   const opmath_t<scalar_t>* grad_columns, int64_t row) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int count = p.taps();
  Taps<scalar_t, kKernel, kData> taps(count);
  Scratch<T[kChannelBlock]> grad_cells(p.cells());
  Scratch<DotTile<T>> kernel_dots(kKernel ? count : 1), data_dots(kData ? count : 1);
  for (; first < end; first += taps.count) {
    taps.fill(a, first, end);
    if constexpr (kKernel) clear(kernel_dots.tiles, count);
    if constexpr (kData) clear(data_dots.tiles, count);
    const scalar_t* input = a.input + taps.n * p.in_h * p.in_w * p.channels + c;
    for (int i = 0; i < taps.count; ++i, grad_columns += row) {
      transpose(grad_columns, p.cells(), width, p.cells(), grad_cells.tiles[0], kChannelBlock);
      T* grad_taps = a.grad_taps + (first + i - a.first) * count * p.channels + c;
      for (int t = 0; t < count; ++t) {
        if (taps.in_padding(t, i)) continue;
        const ColumnsBackwardTap<scalar_t, kKernel, kData> tap{
            taps, t, i, grad_cells.tiles[0], input, grad_taps + t * p.channels};
        sum_channels<T, 2>(
            width, tap,
            {kData ? &data_dots.tiles[t] : nullptr, kKernel ? &kernel_dots.tiles[t] : nullptr}, i);
      }
    }
    for (int t = 0; t < count; ++t) {
      if constexpr (kKernel)
        add_kernel_offset_gradient(a, taps.n, t, taps.row, taps.column, taps.scope.tiles[t],
                                   kernel_dots.tiles[t], /*last=*/c + width == p.channels);
      if constexpr (kData)
        add_data_offset_gradient(a, taps.n, t, taps.row, taps.column, taps.image.tiles[t],
                                 data_dots.tiles[t]);
    }
  }
}

template <typename scalar_t>
DK_INLINE void columns_backward(const DenseBackward<scalar_t>& a, int64_t c, int64_t width,
                                int64_t first, int64_t end, const opmath_t<scalar_t>* grad_columns,
                                int64_t row) {
  dispatch_offsets(a, [&](auto kernel, auto data) {
    columns_backward_of<scalar_t, decltype(kernel)::value, decltype(data)::value>(
        a, c, width, first, end, grad_columns, row);
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
      for (int i = 0; i < p.kernel_h; ++i) {
        if (rows.tiles[i] < 0) continue;
        const int64_t first = (n * p.out_h + rows.tiles[i]) * p.out_w - a.first;
        for (int j = 0; j < p.kernel_w; ++j) {
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
    taps.fill(a, a.first + pixel, a.first + a.count);
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

// Convolutions that are not depthwise: dense.h has the formula. Included once per instruction set:
// tiles.h.
//
// Each thread makes the columns of some pixels and channels, which then lie in its second-level
// cache, and multiplies them at once. The products are our own: a library's would be called for
// every tile, with threads that meet twice in each, and copy the weight anew each time.
#include "columns_kernels.h"

namespace dk {
namespace DK_ISA {

// ---- matrix products ---------------------------------------------------------------------------

// Rows, and vectors of columns, whose sums fit the registers.
constexpr int kSumRows = 6, kSumVectors = DK_VECTOR_BYTES == 64 ? 4 : 2;

// Rows of a right factor, kPanel wide, that stay in the second-level cache.
constexpr int64_t kDepth = 512;

// c[m, n] = (or +=) sum over k of a[m, k] * b[k, n], with the columns n next to each other. Whole
// vectors of b's columns are read.
template <typename T>
struct Product {
  int64_t depth;
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  bool adds;

  void run(int64_t rows, int64_t columns) const {
    constexpr int kWidth = kSumVectors * lanes<Vector<T>, T>;
    for (int64_t n = 0; n < columns; n += kWidth) {
      for (int64_t m = 0; m < rows; m += kSumRows)
        block<kSumRows, kSumVectors>(m, rows - m, n, columns - n);
    }
  }

 private:
  // At most so many rows and vectors of those that are left.
  template <int M, int N>
  DK_INLINE void block(int64_t m, int64_t rows, int64_t n, int64_t columns) const {
    constexpr int L = lanes<Vector<T>, T>;
    if constexpr (M > 1) {
      if (rows < M) return block<M - 1, N>(m, rows, n, columns);
    }
    if constexpr (N > 1) {
      if (columns <= (N - 1) * L) return block<M, N - 1>(m, rows, n, columns);
    }
    T* to = c + m * c_row + n;
    if (columns >= N * L) return sums<M, N>(m, n, to, c_row, adds);
    T part[M * N * L];
    sums<M, N>(m, n, part, N * L, /*adds=*/false);
    for (int u = 0; u < M; ++u) {
      for (int64_t v = 0; v < columns; ++v)
        to[u * c_row + v] = part[u * N * L + v] + (adds ? to[u * c_row + v] : T(0));
    }
  }

  template <int M, int N>
  __attribute__((noinline)) void sums(int64_t m, int64_t n, T* to, int64_t row, bool adds) const {
    typedef Vector<T> V;
    constexpr int L = lanes<V, T>;
    V sum[M][N] = {};
    const T *left = a + m * a_row, *right = b + n;
    for (int64_t k = 0; k < depth; ++k, left += a_step, right += b_row) {
      V factor[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) factor[v] = load_once<V>(right + v * L);
#pragma GCC unroll 6
      for (int u = 0; u < M; ++u) {
        V x = broadcast<V>(left[u * a_row]);
        keep_in_register(x);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[u][v] += x * factor[v];
      }
    }
#pragma GCC unroll 6
    for (int u = 0; u < M; ++u, to += row) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v)
        store(to + v * L, adds ? load<V>(to + v * L) + sum[u][v] : sum[u][v]);
    }
  }
};

// ---- pixels and channels at a time -------------------------------------------------------------

DK_INLINE int64_t block_row(const ConvParams& p) {
  return padded_row(dense_width(p, 0) * p.cells());
}

// Calls body(group, row, at, values) for the channels [c, c + width), group by group: `values`
// columns, the first of which is `row` of its group's and `at` of these channels'.
template <typename Body>
DK_INLINE void for_groups(const ConvParams& p, int64_t c, int64_t width, const Body& body) {
  const int64_t size = p.channels / p.groups;
  for (int64_t first = c; first < c + width;) {
    const int64_t group = first / size, last = least((group + 1) * size, c + width);
    body(group, first % size * p.cells(), (first - c) * p.cells(), (last - first) * p.cells());
    first = last;
  }
}

// Calls body(at, from, channels, cells) for columns [first, first + count) of a group, whole
// vectors of them, chunk by chunk: these cells of these channels, the first of which is column
// first + `at`, and `from` in the order of the weight.
template <typename T, typename Body>
DK_INLINE void for_cells(const ConvParams& p, int64_t first, int64_t count, const Body& body) {
  const int64_t channels = chunk_channels<T>(p), chunk = channels * p.cells();
  for (int64_t at = 0; at < count;) {
    const int64_t column = first + at, cell = column % chunk / channels;
    const int64_t cells = least(p.cells() - cell, (count - at) / channels);
    body(at, column / chunk * chunk + cell, channels, cells);
    at += cells * channels;
  }
}

// ---- forward -----------------------------------------------------------------------------------

// The weight's columns [first, first + count), whole vectors of them, for a panel of output
// channels: to[column, panel_width].
template <typename T>
DK_INLINE void pack_panel(const ConvParams& p, const T* weight, int64_t panel, int64_t first,
                          int64_t count, T* to) {
  const int64_t outputs = p.out_channels / p.groups, row = group_columns(p);
  const int64_t group = panel / output_panels(p), o = panel % output_panels(p) * kPanel;
  const int64_t width = least(outputs - o, kPanel), step = panel_width(p);
  constexpr int64_t kRows = lanes<Vector<T>, T>;  // as transpose does: few streams from memory
  for (int64_t i = 0; i < width; i += kRows) {
    const T* rows = weight + (group * outputs + o + i) * row;
    for_cells<T>(p, first, count, [&](int64_t at, int64_t from, int64_t channels, int64_t cells) {
      for (int64_t c = 0; c < channels; ++c)
        transpose(rows + from + c * p.cells(), row, least(width - i, kRows), cells,
                  to + (at + c) * step + i, channels * step);
    });
  }
  for (int64_t i = 0; width < step && i < count; ++i)
    std::memset(to + i * step + width, 0, sizeof(T) * (step - width));
}

template <typename scalar_t>
void pack_panels(const Columns<scalar_t>& a, opmath_t<scalar_t>* panels, int64_t begin,
                 int64_t end) {
  const ConvParams& p = a.params;
  const int64_t rows = group_columns(p);
  for (int64_t i = begin; i < end; ++i)
    pack_panel(p, a.weight, i, 0, rows, panels + i * rows * panel_width(p));
}

// Some pixels, and the panels of some output channels.
template <typename scalar_t>
struct ForwardTile {
  using T = opmath_t<scalar_t>;
  const DenseForward<scalar_t>& a;
  int64_t first, count;  // pixels
  int64_t first_panel, last_panel;
  T* columns;  // of a block of channels, [count][block_row]
  T* right;    // [kDepth][panel_width], unless all panels are kept
  T* sums;     // [panels][count][panel_width]

  DK_INLINE T* sums_of(int64_t panel) const {
    return sums + (panel - first_panel) * count * panel_width(a.params);
  }

  DK_INLINE void run() const {
    const ConvParams& p = a.params;
    start();
    for (int64_t c = 0; c < p.channels; c += kDenseChannels) {
      const int64_t width = dense_width(p, c);
      fill_columns(a, c, width, first, first + count, columns, block_row(p));
      for_groups(p, c, width, [&](int64_t group, int64_t row, int64_t at, int64_t values) {
        add_products(group, row, columns + at, values);
      });
    }
    finish();
  }

  // Calls body(sums of a panel, its first output channel, how many it has).
  template <typename Body>
  DK_INLINE void for_panels(const Body& body) const {
    const ConvParams& p = a.params;
    const int64_t outputs = p.out_channels / p.groups;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t o = panel % output_panels(p) * kPanel;
      body(sums_of(panel), panel / output_panels(p) * outputs + o, least(outputs - o, kPanel));
    }
  }

  DK_INLINE void start() const {
    for_panels([&](T* to, int64_t o, int64_t width) {
      for (int64_t i = 0; i < count; ++i, to += panel_width(a.params)) {
        if (a.bias)
          std::memcpy(to, a.bias + o, sizeof(T) * width);
        else
          std::memset(to, 0, sizeof(T) * width);
      }
    });
  }

  DK_INLINE void finish() const {
    for_panels([&](const T* from, int64_t o, int64_t width) {
      for (int64_t i = first; i < first + count; ++i, from += panel_width(a.params))
        convert(from, a.output + i * a.params.out_channels + o, width);
    });
  }

  // Of `values` columns of a group from `row` on.
  DK_INLINE void add_products(int64_t group, int64_t row, const T* left, int64_t values) const {
    const ConvParams& p = a.params;
    const int64_t panels = output_panels(p), width = panel_width(p);
    const int64_t begin = most(group * panels, first_panel);
    const int64_t end = least((group + 1) * panels, last_panel);
    for (int64_t k = 0; k < values; k += kDepth) {
      const int64_t depth = least(values - k, kDepth);
      for (int64_t panel = begin; panel < end; ++panel) {
        const Product<T> product{
            depth,        left + k,       block_row(p), 1, panel_rows(panel, row + k, depth),
            width,        sums_of(panel), width,
            /*adds=*/true};
        product.run(count, width);
      }
    }
  }

  DK_INLINE const T* panel_rows(int64_t panel, int64_t row, int64_t depth) const {
    const ConvParams& p = a.params;
    if (a.panels) return a.panels + (panel * group_columns(p) + row) * panel_width(p);
    pack_panel(p, a.weight, panel, row, depth, right);
    return right;
  }
};

template <typename scalar_t>
void dense_forward(const DenseForward<scalar_t>& a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t pixels = p.batch * p.out_h * p.out_w, panels = p.groups * output_panels(p);
  const int64_t tile = (pixels + a.tiles - 1) / a.tiles, part = (panels + a.parts - 1) / a.parts;
  Scratch<T> columns(tile * block_row(p)), right(a.panels ? 1 : kDepth * panel_width(p));
  Scratch<T> sums(part * tile * panel_width(p));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item % a.tiles, j = item / a.tiles;
    const int64_t first = i * pixels / a.tiles, last = (i + 1) * pixels / a.tiles;
    const ForwardTile<scalar_t> body{a,
                                     first,
                                     last - first,
                                     j * panels / a.parts,
                                     (j + 1) * panels / a.parts,
                                     columns.tiles,
                                     right.tiles,
                                     sums.tiles};
    body.run();
  }
}

// ---- backward ----------------------------------------------------------------------------------

// The weight's columns [first, first + count) of a group, for its outputs [begin, end): to[output,
// count].
template <typename T>
DK_INLINE void pack_grad_panel(const ConvParams& p, const T* weight, int64_t group, int64_t first,
                               int64_t count, int64_t begin, int64_t end, T* to) {
  const int64_t outputs = p.out_channels / p.groups, row = group_columns(p);
  for_cells<T>(p, first, count, [&](int64_t at, int64_t from, int64_t channels, int64_t cells) {
    for (int64_t o = begin; o < end; ++o)
      transpose(weight + (group * outputs + o) * row + from, p.cells(), channels, cells,
                to + (o - begin) * count + at, channels);
  });
}

// Where that begins, of all outputs, of which `first` is the first column.
template <typename T>
DK_INLINE T* grad_panel(const ConvParams& p, T* panels, int64_t group, int64_t first) {
  return panels + p.out_channels / p.groups * (group * group_columns(p) + first);
}

// Calls body(group, first, at, count) for the panels of the channels [c, c + width): `count`
// columns, `first` of their group's and `at` of these channels'.
template <typename Body>
DK_INLINE void for_grad_panels(const ConvParams& p, int64_t c, int64_t width, const Body& body) {
  for_groups(p, c, width, [&](int64_t group, int64_t row, int64_t at, int64_t values) {
    for (int64_t n = 0; n < values; n += kPanel)
      body(group, row + n, at + n, least(values - n, kPanel));
  });
}

template <typename scalar_t>
void pack_grad_panels(const Columns<scalar_t>& a, opmath_t<scalar_t>* panels, int64_t begin,
                      int64_t end) {
  const ConvParams& p = a.params;
  for (int64_t c = 0; c < p.channels; c += kDenseChannels) {
    for_grad_panels(p, c, dense_width(p, c),
                    [&](int64_t group, int64_t first, int64_t, int64_t count) {
                      pack_grad_panel(p, a.weight, group, first, count, begin, end,
                                      grad_panel(p, panels, group, first) + begin * count);
                    });
  }
}

// The gradient of the columns of channels [c, c + width) and pixels [first, first + count):
// to[pixel][width * cells], rows block_row apart.
template <typename scalar_t>
DK_INLINE void fill_grad_columns(const DenseBackward<scalar_t>& a, int64_t c, int64_t width,
                                 int64_t first, int64_t count, opmath_t<scalar_t>* to,
                                 opmath_t<scalar_t>* right) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t outputs = p.out_channels / p.groups;
  for_grad_panels(p, c, width, [&](int64_t group, int64_t row, int64_t at, int64_t columns) {
    for (int64_t o = 0; o < outputs; o += kDepth) {
      const int64_t depth = least(outputs - o, kDepth);
      if (!a.panels) pack_grad_panel(p, a.weight, group, row, columns, o, o + depth, right);
      const Product<T> product{depth,
                               a.grad_output + first * p.out_channels + group * outputs + o,
                               p.out_channels,
                               1,
                               a.panels ? grad_panel(p, a.panels, group, row) + o * columns : right,
                               columns,
                               to + at,
                               block_row(p),
                               /*adds=*/o > 0};
      product.run(count, columns);
    }
  });
}

template <typename scalar_t>
void taps_gradient(const DenseBackward<scalar_t>& a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t tile = dense::tile_size(end - begin, most_pixels(p));
  const int64_t step = (tile + kSumRows - 1) / kSumRows * kSumRows;
  // Whole vectors of the right factor are read.
  Scratch<T> grad_columns(step * block_row(p)), right(a.panels ? 1 : (kDepth + 1) * kPanel);
  for (; begin < end; begin += step) {
    const int64_t count = least(step, end - begin), first = a.first + begin;
    for (int64_t c = 0; c < p.channels; c += kDenseChannels) {
      const int64_t width = dense_width(p, c);
      fill_grad_columns(a, c, width, first, count, grad_columns.tiles, right.tiles);
      columns_backward(a, c, width, first, first + count, grad_columns.tiles, block_row(p));
    }
  }
}

// sums[C_out, group_columns] (+)= what pixels [first, first + count) and channels [c, c +
// width) give, whose columns these are.
template <typename scalar_t>
DK_INLINE void add_weight_gradient(const DenseBackward<scalar_t>& a, int64_t c, int64_t width,
                                   int64_t first, int64_t count, const opmath_t<scalar_t>* columns,
                                   opmath_t<scalar_t>* sums, bool adds) {
  using T = opmath_t<scalar_t>;
  // Pixels whose columns of a panel stay in the first-level cache for all output channels.
  constexpr int64_t kPixels = 128;
  const ConvParams& p = a.params;
  const int64_t outputs = p.out_channels / p.groups, step = group_columns(p);
  for_groups(p, c, width, [&](int64_t group, int64_t row, int64_t at, int64_t values) {
    T* to = sums + group * outputs * step + row;
    for (int64_t n = 0; n < values; n += kPanel) {
      for (int64_t i = 0; i < count; i += kPixels) {
        const Product<T> product{least(kPixels, count - i),
                                 a.grad_output + (first + i) * p.out_channels + group * outputs,
                                 1,
                                 p.out_channels,
                                 columns + i * block_row(p) + at + n,
                                 block_row(p),
                                 to + n,
                                 step,
                                 adds || i > 0};
        product.run(outputs, least(kPanel, values - n));
      }
    }
  });
}

template <typename scalar_t>
void weight_gradient(const DenseBackward<scalar_t>& a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t step = dense::tile_size((pixels + a.parts - 1) / a.parts, most_pixels(p));
  Scratch<T> columns(step * block_row(p));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / dense_blocks(p), c = item % dense_blocks(p) * kDenseChannels;
    const int64_t from = part * pixels / a.parts, to = (part + 1) * pixels / a.parts;
    T* sums = a.grad_weight + part * p.out_channels * group_columns(p);
    for (int64_t first = from; first < to; first += step) {
      const int64_t count = least(step, to - first), width = dense_width(p, c);
      fill_columns(a, c, width, first, first + count, columns.tiles, block_row(p));
      add_weight_gradient(a, c, width, first, count, columns.tiles, sums, first > from);
    }
  }
}

template <typename scalar_t>
void sum_parts(const DenseBackward<scalar_t>& a, int64_t begin, int64_t end) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t row = group_columns(p), size = p.out_channels * row;
  const int64_t channels = chunk_channels<T>(p), chunk = channels * p.cells();
  Scratch<T> values(chunk);
  for (int64_t at = begin * row; at < end * row; at += chunk) {
    T* to = a.grad_weight + at;
    for (int64_t part = 1; part < a.parts; ++part) {
      for (int64_t i = 0; i < chunk; ++i) to[i] += to[part * size + i];
    }
    // From the order of the columns to the weight's.
    transpose(to, channels, p.cells(), channels, values.tiles, p.cells());
    std::memcpy(to, values.tiles, sizeof(T) * chunk);
  }
}

template void pack_panels(const Columns<DK_TYPE>&, opmath_t<DK_TYPE>*, int64_t, int64_t);
template void dense_forward(const DenseForward<DK_TYPE>&, int64_t, int64_t);
template void weight_gradient(const DenseBackward<DK_TYPE>&, int64_t, int64_t);
template void sum_parts(const DenseBackward<DK_TYPE>&, int64_t, int64_t);
template void pack_grad_panels(const Columns<DK_TYPE>&, opmath_t<DK_TYPE>*, int64_t, int64_t);
template void taps_gradient(const DenseBackward<DK_TYPE>&, int64_t, int64_t);
template void add_taps(const DenseBackward<DK_TYPE>&, opmath_t<DK_TYPE>*, int64_t, int64_t);
template void scatter_taps(const DenseBackward<DK_TYPE>&, opmath_t<DK_TYPE>*, int64_t, int64_t);

}  // namespace DK_ISA
}  // namespace dk

// Backward kernels. Shapes: tiles.cuh.
//
// Sums over channels (the offsets' gradients) are folded within a pixel's threads, then added up
// over the channel tiles of a block in order, and over the groups of tiles by the host function;
// only the complete sum is turned inward, by turn_inward_kernel. Sums over pixels (the weight's
// gradient) are kept by each thread for its own channels in its own part of shared memory, added up
// once per block in order, and over the blocks by sum_weight_kernel. So nothing but the scatter of
// a data_offset needs atomics, and everything else comes out the same every time.
#pragma once

#include "tiles.cuh"

namespace dk {
namespace cuda {

// ---- a block's share of the work ----------------------------------------------------------------

// Pixel tiles [first, last) of a split and channel tiles [first_channels, last_channels) of a
// group.
struct Share {
  int split, group, first_channels, last_channels;
  int64_t first, last;

  template <typename scalar_t>
  DK_INLINE Share(unsigned block, const BackwardArgs<scalar_t>& a) {
    split = static_cast<int>(block / a.groups);
    group = static_cast<int>(block % a.groups);
    first_channels = static_cast<int>(a.channels_of_group.first(group));
    last_channels = static_cast<int>(a.channels_of_group.first(group + 1));
    first = a.tiles_of_split.first(split);
    last = a.tiles_of_split.first(split + 1);
  }
};

// A thread's sums over pixels, [cells, row]: those of its warp, its own column.
template <int V, typename T>
__device__ __forceinline__ T* sums_of(int thread, T* weight_sum, int cells) {
  return weight_sum + thread / kWarpSize * cells * kRow<V> + thread % kWarpSize * V;
}

template <int V, typename T>
__device__ __forceinline__ void clear_sums(T* sums, int cells) {
  for (int cell = 0; cell < cells; ++cell) store<V>(sums + cell * kRow<V>, Vector<T, V>{});
}

template <int V, typename T>
__device__ __forceinline__ void add_to_sum(T* sum, T factor, const Vector<T, V>& x) {
  Vector<T, V> s = load<V>(sum);
  add_scaled(s, factor, x);
  store<V>(sum, s);
}

// Adds up the threads' sums of the channel tile that begins at `begin` into the block's partial
// gradient.
template <int V, typename scalar_t>
__device__ __forceinline__ void store_weight_partial(const BackwardArgs<scalar_t>& a, int split,
                                                     opmath_t<scalar_t>* weight_sum, int cells,
                                                     int begin) {
  using T = opmath_t<scalar_t>;
  const PixelThread thread(a.channels);
  const int c = begin + thread.lane * V;
  if (c >= a.params.channels) return;
  for (int cell = thread.pixel; cell < cells; cell += thread.pixels) {
    Vector<T, V> sum{};
    for (int lane = thread.lane; lane < kWarpSize; lane += a.channels.lanes) {
      const T* from = weight_sum + cell * kRow<V> + lane * V;
      for (int warp = 0; warp < a.warps; ++warp, from += cells * kRow<V>)
        add_scaled(sum, T(1), load<V>(from));
    }
    store<V>(a.weight_partial + (int64_t(split) * cells + cell) * a.params.channels + c, sum);
  }
}

template <typename T>
__device__ __forceinline__ void add_offset_gradient(const Offset<T>& offset, int taps, int64_t n,
                                                    int t, int h, int w, const TapSample<T>& sample,
                                                    const Vector<T, 4>& grad_coef) {
  T* at = offset_of(offset, n, t, h, w);
  at[0] += sample.grad_h(grad_coef);
  at[offset.strides.c] += sample.grad_w(grad_coef);
  if (offset.modulated) *factor_of(offset, taps, n, t, h, w) += sample.grad_factor(grad_coef);
}

template <typename T>
__device__ __forceinline__ Offset<T> of_group(const OffsetGradients<T>& all, int group) {
  Offset<T> offset = all.first;
  offset.data += group * all.size;
  return offset;
}

// ---- rigid data grid ----------------------------------------------------------------------------
//
// By input pixels: pixel q and tap t meet in the one output p = (q + pad - k_t * dilation) /
// stride, if that is on the stride grid. Every pair (p, t) is visited once, by one block: where it
// reads the scope is found, and its offset's gradient is written, there and nowhere else. Pairs
// that read padding, or nothing of the scope, are not visited, so their gradient must be zero
// beforehand.

// The output pixel that input pixel q feeds through tap t; h < 0: none.
template <typename Sizes>
DK_INLINE Pixel fed_pixel(const ConvParams& p, const Sizes& size, const Pixel& q, int t) {
  const int h = fed_output(q.h, p.pad_h, t / size.kernel_w, p.dilation_h, p.stride_h, p.out_h);
  const int w = fed_output(q.w, p.pad_w, t % size.kernel_w, p.dilation_w, p.stride_w, p.out_w);
  return {q.n, w < 0 ? -1 : h, w};
}

// The 2x2 cells of the scope around a tap, of which the first lies in row h and column w, or one
// outside; how far towards the others the tap lies.
template <typename T>
struct ScopeBlock {
  int h, w;
  T part_h, part_w;

  DK_INLINE bool meets(int scope_h, int scope_w) const {
    return h >= -1 && h < scope_h && w >= -1 && w < scope_w;
  }
  // Of a block that meets the scope: at how many bytes the first cell lies in a scope [cells, row]
  // of T, counted from kFirst on; negative if not all cells do; never 0.
  DK_INLINE int code(int scope_h, int scope_w, int row) const {
    const bool all = h >= 0 && h + 1 < scope_h && w >= 0 && w + 1 < scope_w;
    return all ? kFirst + (h * scope_w + w) * row * static_cast<int>(sizeof(T))
               : -1 - ((h + 1) << 16 | (w + 1));
  }
  // Not 0, or nvcc stores the first cell's sums one by one.
  static constexpr int kFirst = 16;
};

template <typename T, typename Sizes>
DK_INLINE ScopeBlock<T> block_around(const ConvParams& p, const Sizes& size,
                                     const Location<T>& at) {
  const auto h = find_in_scope(at.h, size.scope_h, p.clip);
  const auto w = find_in_scope(at.w, size.scope_w, p.clip);
  return {h.lower, w.lower, h.x - T(h.lower), w.x - T(w.lower)};
}

// Where a tap lies in its block, `h` of [0, 1] from the upper row to the lower and `w` from the
// left column to the right: the coefficients of the last cell, `both`, and the first, `neither`.
template <typename T>
struct BlockPart {
  T h, w, both, neither;

  DK_INLINE BlockPart(T h, T w) : BlockPart(h, w, h * w, 1 - h - (w - h * w)) {}
  DK_INLINE BlockPart(T h, T w, T both, T neither) : h(h), w(w), both(both), neither(neither) {}
};

// What a thread's channels read of the cells [cells, row] of a scope, and the sums of the cells'
// gradients, likewise: in registers until others are wanted. All threads of a pixel agree on that.
// Cells outside the scope are zero.
template <typename scalar_t, int V, typename Sizes>
class HeldBlock {
  using T = opmath_t<scalar_t>;
  static constexpr int kFirst = ScopeBlock<T>::kFirst;

 public:
  DK_INLINE HeldBlock(const Sizes& size, const scalar_t* weight, T* sums)
      : size(size), weight(weight), sums(sums) {}

  DK_INLINE void hold(int code) {
    if (code == at) return;
    put_back();
    at = code;
    Vector<T, V> cell[4];
    for_cells(
        [&](int k, int first, int step) {
          cell[k] = load<V>(from(weight, first) + step);
          sum[k] = load<V>(from(sums, first) + step);
        },
        [&](int k) { cell[k] = sum[k] = {}; });
    corner = cell[0];
    across = difference(cell[1], cell[0]);
    down = difference(cell[2], cell[0]);
    both = difference(difference(cell[3], cell[2]), across);
  }
  DK_INLINE void put_back() const {
    for_cells([&](int k, int first, int step) { store<V>(from(sums, first) + step, sum[k]); },
              [](int) {});
  }

  DK_INLINE Vector<T, V> value(const BlockPart<T>& part) const {
    Vector<T, V> x = corner;
    add_scaled(x, part.w, across);
    add_scaled(x, part.h, grad_h(part));
    return x;
  }
  // Derivatives of the value.
  DK_INLINE Vector<T, V> grad_h(const BlockPart<T>& part) const {
    Vector<T, V> x = down;
    add_scaled(x, part.w, both);
    return x;
  }
  DK_INLINE Vector<T, V> grad_w(const BlockPart<T>& part) const {
    Vector<T, V> x = across;
    add_scaled(x, part.h, both);
    return x;
  }
  // Adds the gradients of the cells, given that of the value.
  DK_INLINE void add(const BlockPart<T>& part, const Vector<T, V>& grad) {
    add_scaled(sum[0], part.neither, grad);
    add_scaled(sum[1], part.w - part.both, grad);
    add_scaled(sum[2], part.h - part.both, grad);
    add_scaled(sum[3], part.both, grad);
  }

 private:
  const Sizes size;
  const scalar_t* weight;
  T* sums;
  int at = 0;  // a block's code
  Vector<T, V> corner{}, across{}, down{}, both{}, sum[4] = {};

  // `first` bytes of T, counted from kFirst on, after the beginning.
  template <typename U>
  static DK_INLINE U* from(U* begin, unsigned first) {
    using Byte = std::conditional_t<std::is_const_v<U>, const char, char>;
    constexpr unsigned part = sizeof(T) / sizeof(U);
    return reinterpret_cast<U*>(reinterpret_cast<Byte*>(begin) + first / part) - kFirst / sizeof(T);
  }

  // Calls inside(k, first, step) for the cells of the block that the scope has, `step` elements
  // after `first`; outside(k) for others.
  template <typename Inside, typename Outside>
  DK_INLINE void for_cells(const Inside& inside, const Outside& outside) const {
    const int row = size.scope_w * kRow<V>;
    if (at > 0) {
      DK_UNROLL
      for (int k = 0; k < 4; ++k) inside(k, at, k / 2 * row + k % 2 * kRow<V>);
    } else if (at < 0) {
      const int h = ((-1 - at) >> 16) - 1, w = ((-1 - at) & 0xffff) - 1;
      DK_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int y = h + k / 2, x = w + k % 2;
        if (y >= 0 && y < size.scope_h && x >= 0 && x < size.scope_w)
          inside(k, kFirst, y * row + x * kRow<V>);
        else
          outside(k);
      }
    }
  }
};

// The same of a single cell, for want of kernel offsets.
template <typename scalar_t, int V, typename Sizes>
struct HeldCell {
  using T = opmath_t<scalar_t>;
  const scalar_t* weight;
  T* sums;
  int at = -1;  // its position
  Vector<T, V> value{}, sum{};

  DK_INLINE HeldCell(const Sizes&, const scalar_t* weight, T* sums) : weight(weight), sums(sums) {}
  DK_INLINE void hold(int position) {
    if (position == at) return;
    put_back();
    at = position;
    value = load<V>(weight + at);
    sum = load<V>(sums + at);
  }
  DK_INLINE void put_back() const {
    if (at >= 0) store<V>(sums + at, sum);
  }
};

// Where the pixels that a thread holds read through a tap.
struct alignas(16) HeldTaps {
  TapIndex taps[kHeldPixels];

  DK_INLINE const TapIndex& operator[](int i) const { return taps[i]; }
  // Whether all do, and the same cells, as mostly: then no pixel's loads wait for a condition.
  DK_INLINE bool alike() const {
    int pixels = taps[0].pixel;
    bool same = true;
    DK_UNROLL
    for (int i = 1; i < kHeldPixels; ++i) {
      pixels |= taps[i].pixel;
      same &= taps[i].cell == taps[0].cell;
    }
    return same && pixels >= 0;
  }
};

// Sums over a pixel's threads, N for each of the pixels that they hold, take the place of what all
// of them have read there: from coefficient `first` of each.
template <int N, typename T>
__device__ __forceinline__ void store_sums(Vector<T, 4>* to, int first, T (&x)[N * kHeldPixels],
                                           int lanes, int lane) {
  const T sum = fold_sum(x, lanes);
  __syncwarp();
  if (lane < N * kHeldPixels) to[lane / N].v[first + lane % N] = sum;
}

// Where the taps of a thread's input pixel q read, and how: of kernel_coef, the parts of a block
// or, in place of the last, the factor of a tap that has one.
template <typename scalar_t, int V, int K, int S, bool kKernel>
__device__ __forceinline__ void fill_fed_taps(const BackwardArgs<scalar_t>& a,
                                              const Sizes<K, S>& size,
                                              const Shared<scalar_t, V, kKernel, false>& shared,
                                              const PixelTile& tile, const Pixel& q, bool inside,
                                              bool modulated) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t n = tile.first_image + q.n;
  for (int j = threadIdx.x; j < size.taps() * kPixels; j += blockDim.x) {
    const int t = j / kPixels;
    TapIndex at{t * kRow<V>, -1};
    const Pixel out = inside ? fed_pixel(p, size, q, t) : Pixel{0, -1, -1};
    if (out.h >= 0) {
      at.pixel = (q.n * static_cast<int>(p.out_h) + out.h) * static_cast<int>(p.out_w) + out.w;
      if constexpr (kKernel) {
        const auto block =
            block_around(p, size, locate_in_scope(size, a.kernel_offset, n, t, out.h, out.w));
        at.cell = block.code(size.scope_h, size.scope_w, kRow<V>);
        if (!block.meets(size.scope_h, size.scope_w)) at.pixel = -1;
        const BlockPart<T> part(block.part_h, block.part_w);
        const T last =
            modulated ? *factor_of(a.kernel_offset, size.taps(), n, t, out.h, out.w) : part.neither;
        shared.kernel_coef[j] = {{part.h, part.w, part.both, last}};
      }
    }
    shared.index[j] = at;
  }
}

// Adds the gradients of a thread's input pixel q, summed over the channels of a tile in the place
// of `h`, `w` and, of a factor, `both`.
template <typename scalar_t, int V, int K, int S>
__device__ __forceinline__ void add_fed_gradients(const ConvParams& p, const Sizes<K, S>& size,
                                                  const Shared<scalar_t, V, true, false>& shared,
                                                  const PixelTile& tile, const Pixel& q,
                                                  const Offset<opmath_t<scalar_t>>& grad,
                                                  bool modulated) {
  using T = opmath_t<scalar_t>;
  const int64_t n = tile.first_image + q.n;
  for (int j = threadIdx.x; j < size.taps() * kPixels; j += blockDim.x) {
    if (shared.index[j].pixel < 0) continue;
    const int t = j / kPixels;
    const Pixel out = fed_pixel(p, size, q, t);
    const Vector<T, 4> sum = shared.kernel_coef[j];
    const T factor = modulated ? sum.v[3] : T(1);
    T* to = offset_of(grad, n, t, out.h, out.w);
    // A clipped scope of one cell is constant along its axis.
    if (!p.clip || size.scope_h > 1) to[0] += factor * sum.v[0];
    if (!p.clip || size.scope_w > 1) to[grad.strides.c] += factor * sum.v[1];
    if (modulated) *factor_of(grad, size.taps(), n, t, out.h, out.w) += sum.v[2];
  }
}

template <typename scalar_t, int V, int K, int S, bool kKernel>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const BackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  using Held = std::conditional_t<kKernel, HeldBlock<scalar_t, V, Sizes<K, S>>,
                                  HeldCell<scalar_t, V, Sizes<K, S>>>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const int lanes = a.channels.lanes;
  const PixelThread thread(a.channels);
  const Shared<scalar_t, V, kKernel, false> shared(memory, taps, cells, a.warps);
  T* sums = sums_of<V>(threadIdx.x, shared.weight_sum, cells);
  const scalar_t* weight = shared.weight + thread.lane * V;
  const int64_t image_size = p.out_h * p.out_w * channels;  // of grad_output
  const Share share(blockIdx.x, a);
  const Offset<T> grad_kernel_offset = of_group(a.grad_kernel_offset, share.group);
  const bool modulated = K == 0 && a.kernel_offset.modulated;  // launch_backward

  for (int channel_tile = share.first_channels; channel_tile < share.last_channels;
       ++channel_tile) {
    const int begin = channel_tile * lanes * V, c = begin + thread.lane * V;
    shared.stage_weight(size, a.weight, begin, lanes * V, channels);
    clear_sums<V>(sums, cells);
    PixelTile tile(share.first * kPixels, p.batch, p.in_h, p.in_w);
    for (int64_t first = share.first * kPixels; first < share.last * kPixels;
         first += kPixels, tile.advance()) {
      // A warp's threads keep their pixels: kPixels is its size.
      const int own = static_cast<int>(threadIdx.x) % kPixels;
      const Pixel q = tile[own];
      fill_fed_taps(a, size, shared, tile, q, own < tile.count, modulated);
      __syncthreads();

      const auto is_own = [&](int i) { return i < tile.count && c < channels; };
      const Pixels<const scalar_t> grad_output(a.grad_output + tile.first_image * image_size + c,
                                               channels);
      const Pixels<const scalar_t> input(a.input + first * channels + c, channels);
      const Pixels<scalar_t> grad_input(a.grad_input + first * channels + c, channels);
      for (int i0 = thread.pixel * kHeldPixels; i0 < kPixels; i0 += thread.pixels * kHeldPixels) {
        Vector<T, V> x[kHeldPixels] = {}, grad_x[kHeldPixels] = {};
        DK_UNROLL
        for (int i = 0; i < kHeldPixels; ++i) {
          if (is_own(i0 + i)) x[i] = load<V>(input[i0 + i]);
        }
        Held held(size, weight, sums);
        const TapIndex* index = shared.index + i0;
        Vector<T, 4>* tap = shared.kernel_coef + i0;
        for (const TapIndex* end = index + taps * kPixels; index != end;
             index += kPixels, tap += kPixels) {
          T grad[2 * kHeldPixels] = {}, grad_factor[kHeldPixels] = {};
          // A pair whose cells are held.
          const auto visit = [&](int i, int pixel) {
            const auto g = load<V>(grad_output[pixel]);
            auto gx = product(g, x[i]);
            Vector<T, V> w;
            if constexpr (kKernel) {
              const Vector<T, 4> coef = tap[i];
              const auto part = modulated
                                    ? BlockPart<T>(coef.v[0], coef.v[1])
                                    : BlockPart<T>(coef.v[0], coef.v[1], coef.v[2], coef.v[3]);
              w = held.value(part);
              grad[2 * i] = dot(gx, held.grad_h(part));
              grad[2 * i + 1] = dot(gx, held.grad_w(part));
              if (modulated) {
                grad_factor[i] = dot(gx, w);
                w = scaled(coef.v[3], w);
                gx = scaled(coef.v[3], gx);
              }
              held.add(part, gx);
            } else {
              w = held.value;
              add_scaled(held.sum, T(1), gx);
            }
            DK_UNROLL
            for (int v = 0; v < V; ++v) grad_x[i].v[v] += g.v[v] * w.v[v];
          };
          const auto at = *reinterpret_cast<const HeldTaps*>(index);
          if (c < channels && at.alike()) {
            held.hold(at[0].cell);
            DK_UNROLL
            for (int i = 0; i < kHeldPixels; ++i) visit(i, at[i].pixel);
          } else if (c < channels) {
            DK_UNROLL
            for (int i = 0; i < kHeldPixels; ++i) {
              if (at[i].pixel < 0) continue;
              held.hold(at[i].cell);
              visit(i, at[i].pixel);
            }
          }
          if constexpr (kKernel) {
            store_sums<2>(tap, 0, grad, lanes, thread.lane);
            if (modulated) store_sums<1>(tap, 2, grad_factor, lanes, thread.lane);
          }
        }
        held.put_back();
        DK_UNROLL
        for (int i = 0; i < kHeldPixels; ++i) {
          if (is_own(i0 + i)) store<V>(grad_input[i0 + i], grad_x[i]);
        }
      }
      __syncthreads();

      if constexpr (kKernel) {
        add_fed_gradients(p, size, shared, tile, q, grad_kernel_offset, modulated);
        // The same thread fills the same pairs of the next tile: no barrier.
      }
    }
    // A split has at least one tile, whose last barrier comes after all sums.
    store_weight_partial<V>(a, share.split, shared.weight_sum, cells, begin);
    __syncthreads();
  }
}

// ---- deformed data grid -------------------------------------------------------------------------

// By output pixels: the gradients of offsets and weight; the input's, if wanted, by atomics.
template <typename scalar_t, int V, int K, int S, bool kKernel>
__global__ void __launch_bounds__(kThreads, 2)
    backward_data_kernel(const BackwardArgs<scalar_t> a) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  const ConvParams& p = a.params;
  const Sizes<K, S> size(p);
  const int taps = size.taps(), cells = size.cells(), channels = static_cast<int>(p.channels);
  const int lanes = a.channels.lanes;
  const PixelThread thread(a.channels);
  const Shared<scalar_t, V, kKernel, true> shared(memory, taps, cells, a.warps);
  T* sums = sums_of<V>(threadIdx.x, shared.weight_sum, cells);
  const scalar_t* weight = shared.weight + thread.lane * V;
  const Steps cell_steps(size.scope_h, size.scope_w, kRow<V>),
      pixel_steps(p.in_h, p.in_w, channels);
  const Share share(blockIdx.x, a);
  const Offset<T> grad_kernel_offset = of_group(a.grad_kernel_offset, share.group);
  const Offset<T> grad_data_offset = of_group(a.grad_data_offset, share.group);

  for (int channel_tile = share.first_channels; channel_tile < share.last_channels;
       ++channel_tile) {
    const int begin = channel_tile * lanes * V, c = begin + thread.lane * V;
    shared.stage_weight(size, a.weight, begin, lanes * V, channels);
    clear_sums<V>(sums, cells);
    PixelTile tile(share.first * kPixels, p.batch, p.out_h, p.out_w);
    for (int64_t first = share.first * kPixels; first < share.last * kPixels;
         first += kPixels, tile.advance()) {
      shared.fill_output_taps(p, size, tile, a.kernel_offset, a.data_offset);
      __syncthreads();

      const int64_t image = tile.first_image * p.in_h * p.in_w * channels + c;
      for (int i = thread.pixel; i < kPixels; i += thread.pixels) {
        const bool active = i < tile.count && c < channels;
        Vector<T, V> g{};
        if (active) g = load<V>(a.grad_output + (first + i) * channels + c);
        for (int t = 0; t < taps; ++t) {
          const int j = t * kPixels + i;
          // Σ over channels of what each coefficient is multiplied with: the data's, the kernel's.
          T grad_coef[kKernel ? 8 : 4] = {};
          if (active) {
            const TapIndex at = shared.index[j];
            const Vector<T, 4> data_coef = shared.data_coef[j];
            const int64_t from = image + static_cast<int64_t>(at.pixel) * channels;
            Vector<T, V> x[4], value{};
            DK_UNROLL
            for (int k = 0; k < 4; ++k) {
              x[k] = load<V>(a.input + from + pixel_steps[k]);
              add_scaled(value, data_coef.v[k], x[k]);
            }
            const auto gx = product(g, value);
            Vector<T, V> w{};
            if constexpr (kKernel) {
              const Vector<T, 4> coef = shared.kernel_coef[j];
              DK_UNROLL
              for (int k = 0; k < 4; ++k) {
                const auto cell_weight = load<V>(weight + at.cell + cell_steps[k]);
                add_scaled(w, coef.v[k], cell_weight);
                grad_coef[4 + k] = dot(gx, cell_weight);
                add_to_sum<V>(sums + at.cell + cell_steps[k], coef.v[k], gx);
              }
            } else {
              w = load<V>(weight + at.cell);
              add_to_sum<V>(sums + at.cell, T(1), gx);
            }
            const auto gw = product(g, w);
            DK_UNROLL
            for (int k = 0; k < 4; ++k) {
              grad_coef[k] = dot(gw, x[k]);
              if (!a.grad_input_sum || data_coef.v[k] == T(0)) continue;
              atomic_add(a.grad_input_sum + from + pixel_steps[k], scaled(data_coef.v[k], gw));
            }
          }
          // All threads of the pixel have read its coefficients: their gradient takes the place.
          const T sum = fold_sum<kKernel ? 8 : 4>(grad_coef, lanes);
          __syncwarp();
          if (thread.lane < 4) shared.data_coef[j].v[thread.lane] = sum;
          if (kKernel && thread.lane >= 4 && thread.lane < 8)
            shared.kernel_coef[j].v[thread.lane - 4] = sum;
        }
      }
      __syncthreads();

      for (int j = threadIdx.x; j < taps * kPixels; j += blockDim.x) {
        const int t = j / kPixels, i = j % kPixels;
        if (i >= tile.count) continue;
        const Pixel q = tile[i];
        const int64_t n = tile.first_image + q.n;
        add_offset_gradient(grad_data_offset, taps, n, t, q.h, q.w,
                            sample_data(p, size, a.data_offset, n, t, q.h, q.w),
                            shared.data_coef[j]);
        if constexpr (kKernel) {
          add_offset_gradient(grad_kernel_offset, taps, n, t, q.h, q.w,
                              sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w),
                              shared.kernel_coef[j]);
        }
      }
      // The same thread fills the same pairs of the next tile: no barrier.
    }
    // A split has at least one tile, whose last barrier comes after all sums.
    store_weight_partial<V>(a, share.split, shared.weight_sum, cells, begin);
    __syncthreads();
  }
}

template <typename scalar_t>
__global__ void base_pixels_kernel(const BackwardArgs<scalar_t> a, int64_t* base) {
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= p.batch * p.out_h * p.out_w * size.taps()) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, pair, &n, &t);
  const auto sample = sample_data(p, size, a.data_offset, n, t, q.h, q.w);
  base[pair] = (n * p.in_h + sample.h.cell) * p.in_w + sample.w.cell;
}

// By input pixels, one warp each, a thread per channel: adds, in sorted order, what the pairs send
// here whose 2x2 block begins at this pixel, left of it, above it, and above left of it.
template <typename scalar_t, bool kKernel>
__global__ void __launch_bounds__(kThreads)
    gather_grad_input_kernel(const BackwardArgs<scalar_t> a, const int64_t* sorted_base,
                             const int64_t* pair, scalar_t* grad_input) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int channels = static_cast<int>(p.channels);
  const int channel_tiles = (channels + kWarpSize - 1) / kWarpSize;
  const int c = static_cast<int>(blockIdx.x % channel_tiles) * kWarpSize + threadIdx.x % kWarpSize;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x / channel_tiles) * (kThreads / kWarpSize) +
                        threadIdx.x / kWarpSize;
  if (pixel >= p.batch * p.in_h * p.in_w || c >= channels) return;
  const int64_t pairs = p.batch * p.out_h * p.out_w * size.taps();
  const int x = static_cast<int>(pixel % p.in_w), y = static_cast<int>(pixel / p.in_w % p.in_h);
  const scalar_t* weight = a.weight + static_cast<int64_t>(c) * size.cells();
  const Steps cell_steps(size.scope_h, size.scope_w, 1);
  T sum = T(0);
  DK_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (y < k / 2 || x < k % 2) continue;
    const int64_t base = pixel - k / 2 * p.in_w - k % 2;
    for (int64_t e = lower_bound(sorted_base, pairs, base); e < pairs && sorted_base[e] == base;
         ++e) {
      int64_t n;
      int t;
      const Pixel q = pixel_of_pair(p, size, pair[e], &n, &t);
      const T coef = sample_data(p, size, a.data_offset, n, t, q.h, q.w).coef().v[k];
      if (coef == T(0)) continue;
      T w;
      if constexpr (kKernel) {
        const auto sample = sample_weight(p, size, a.kernel_offset, n, t, q.h, q.w);
        const scalar_t* cell = weight + sample.h.cell * size.scope_w + sample.w.cell;
        const auto scope_coef = sample.coef();
        w = T(0);
        for (int j = 0; j < 4; ++j) w += scope_coef.v[j] * static_cast<T>(cell[cell_steps[j]]);
      } else {
        w = static_cast<T>(weight[t]);
      }
      const int64_t output = (n * p.out_h + q.h) * p.out_w + q.w;
      sum += coef * (static_cast<T>(a.grad_output[output * channels + c]) * w);
    }
  }
  grad_input[pixel * channels + c] = static_cast<scalar_t>(sum);
}

// ---- kernel offsets -----------------------------------------------------------------------------

// One thread per output pixel and tap.
template <typename scalar_t>
__global__ void turn_inward_kernel(const BackwardArgs<scalar_t> a,
                                   const Offset<opmath_t<scalar_t>> grad) {
  const ConvParams& p = a.params;
  const Sizes<0, 0> size(p);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= p.batch * p.out_h * p.out_w * size.taps()) return;
  int64_t n;
  int t;
  const Pixel q = pixel_of_pair(p, size, pair, &n, &t);
  const auto location = locate_in_scope(size, a.kernel_offset, n, t, q.h, q.w);
  auto* at = offset_of(grad, n, t, q.h, q.w);
  at[0] = inward(location.h, size.scope_h, at[0]);
  at[grad.strides.c] = inward(location.w, size.scope_w, at[grad.strides.c]);
}

// ---- weight -------------------------------------------------------------------------------------

constexpr int kSumRows = 8;

// Sums the splits: kWarpSize channels of one cell per block, kSumRows interleaved partial sums.
template <typename scalar_t>
__global__ void sum_weight_kernel(const BackwardArgs<scalar_t> a, scalar_t* grad_weight) {
  using T = opmath_t<scalar_t>;
  DK_SHARED_MEMORY(memory);
  T* partial = reinterpret_cast<T*>(memory);  // [kSumRows, kWarpSize]
  const Sizes<0, 0> size(a.params);
  const int cells = size.cells(), channels = static_cast<int>(a.params.channels);
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize;
  const int cell = static_cast<int>(blockIdx.x % cells);
  const int c = static_cast<int>(blockIdx.x / cells) * kWarpSize + lane;
  T sum = T(0);
  if (c < channels) {
    for (int split = row; split < a.splits; split += kSumRows) {
      sum += a.weight_partial[(static_cast<int64_t>(split) * cells + cell) * channels + c];
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || c >= channels) return;
  for (int r = 1; r < kSumRows; ++r) sum += partial[r * kWarpSize + lane];
  grad_weight[static_cast<int64_t>(c) * cells + cell] = static_cast<scalar_t>(sum);
}

// ---- launches -----------------------------------------------------------------------------------

template <typename scalar_t>
void launch_backward(const BackwardArgs<scalar_t>& a, cudaStream_t stream) {
  const ConvParams& p = a.params;
  dispatch_offsets(a.kernel_offset.data, a.data_offset.data, [&](auto kernel, auto data) {
    constexpr bool kKernel = decltype(kernel)::value, kData = decltype(data)::value;
    const size_t bytes =
        shared_layout<scalar_t>(a.channels.vector, p.taps(), p.cells(), a.warps, kKernel, kData)
            .bytes;
    const auto run = [&](auto vector, auto k, auto s) {
      constexpr int V = decltype(vector)::value, K = decltype(k)::value, S = decltype(s)::value;
      void (*function)(BackwardArgs<scalar_t>);
      if constexpr (kData)
        function = backward_data_kernel<scalar_t, V, K, S, kKernel>;
      else
        function = backward_kernel<scalar_t, V, K, S, kKernel>;
      launch(function, static_cast<int64_t>(a.splits) * a.groups, a.warps * kWarpSize, bytes,
             stream, a);
    };
    if (a.channels.vector == 1) return run(Int<1>(), Int<0>(), Int<0>());
    const Int<16 / sizeof(opmath_t<scalar_t>)> wide;
    // Only kernels of any size spend registers on factors.
    if (kKernel && !kData && a.kernel_offset.modulated) return run(wide, Int<0>(), Int<0>());
    dispatch_sizes<kKernel>(p, [&](auto k, auto s) { run(wide, k, s); });
  });
}

// Runs `kernel` with a thread for every output pixel and tap.
template <typename scalar_t, typename... Params>
void launch_pairs(void (*kernel)(BackwardArgs<scalar_t>, Params...),
                  const BackwardArgs<scalar_t>& a, cudaStream_t stream,
                  const std::common_type_t<Params>&... args) {
  const ConvParams& p = a.params;
  const int64_t pairs = p.batch * p.out_h * p.out_w * p.taps();
  launch(kernel, (pairs + kThreads - 1) / kThreads, kThreads, 0, stream, a, args...);
}

template <typename scalar_t>
void launch_turn_inward(const BackwardArgs<scalar_t>& a, const Offset<opmath_t<scalar_t>>& grad,
                        cudaStream_t stream) {
  launch_pairs(turn_inward_kernel<scalar_t>, a, stream, grad);
}

template <typename scalar_t>
void launch_sum_weight(const BackwardArgs<scalar_t>& a, scalar_t* grad_weight,
                       cudaStream_t stream) {
  const int64_t blocks = (a.params.channels + kWarpSize - 1) / kWarpSize * a.params.cells();
  launch(sum_weight_kernel<scalar_t>, blocks, kSumRows * kWarpSize,
         sizeof(opmath_t<scalar_t>) * kSumRows * kWarpSize, stream, a, grad_weight);
}

template <typename scalar_t>
void launch_base_pixels(const BackwardArgs<scalar_t>& a, int64_t* base, cudaStream_t stream) {
  launch_pairs(base_pixels_kernel<scalar_t>, a, stream, base);
}

template <typename scalar_t>
void launch_gather_grad_input(const BackwardArgs<scalar_t>& a, const int64_t* sorted_base,
                              const int64_t* pair, scalar_t* grad_input, cudaStream_t stream) {
  const ConvParams& p = a.params;
  constexpr int pixels = kThreads / kWarpSize;
  const int64_t blocks = (p.batch * p.in_h * p.in_w + pixels - 1) / pixels *
                         ((p.channels + kWarpSize - 1) / kWarpSize);
  if (a.kernel_offset.data) {
    launch(gather_grad_input_kernel<scalar_t, true>, blocks, kThreads, 0, stream, a, sorted_base,
           pair, grad_input);
  } else {
    launch(gather_grad_input_kernel<scalar_t, false>, blocks, kThreads, 0, stream, a, sorted_base,
           pair, grad_input);
  }
}

}  // namespace cuda
}  // namespace dk

#define DK_INSTANTIATE_BACKWARD(scalar_t)                                                  \
  namespace dk {                                                                           \
  namespace cuda {                                                                         \
  template void launch_backward(const BackwardArgs<scalar_t>&, cudaStream_t);              \
  template void launch_turn_inward(const BackwardArgs<scalar_t>&,                          \
                                   const Offset<opmath_t<scalar_t>>&, cudaStream_t);       \
  template void launch_sum_weight(const BackwardArgs<scalar_t>&, scalar_t*, cudaStream_t); \
  template void launch_base_pixels(const BackwardArgs<scalar_t>&, int64_t*, cudaStream_t); \
  template void launch_gather_grad_input(const BackwardArgs<scalar_t>&, const int64_t*,    \
                                         const int64_t*, scalar_t*, cudaStream_t);         \
  }                                                                                        \
  }

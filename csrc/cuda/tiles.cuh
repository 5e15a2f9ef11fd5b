// What the kernels share: vectors of channels, tiles of pixels, and the taps of a tile.
//
//   N, C, H, W       batch, channels, input size;  H_out, W_out: output size
//   K_h, K_w         kernel size: the taps t of an output pixel, row-major
//   S_h, S_w         scope size: the cells of the stored weight
//   input            [N, H, W, C], grad_input likewise
//   output           [N, H_out, W_out, C], grad_output likewise
//   weight           [C, S_h*S_w]
//   kernel_offset    [N, 2*K_h*K_w, H_out, W_out] any strides; channel 2t: row, 2t+1: column of tap
//                    t; perhaps K_h*K_w more, 2*K_h*K_w + t: what tap t is multiplied by
//   data_offset      the same
//
// A block works on a tile of kPixels pixels and one tile of channels at a time. First its threads
// share out the (tap, pixel) pairs and leave, in shared memory, where each reads and with which
// bilinear coefficients; then a group of `lanes` threads takes one pixel, each thread a vector of
// channels. So the sampling arithmetic is done once per pixel, not once per channel.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "depthwise.h"
#include "launch.cuh"

namespace dk {
namespace cuda {

// ---- vectors of channels ------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T v[V];
};

template <int V, typename scalar_t>
DK_INLINE Vector<opmath_t<scalar_t>, V> load(const scalar_t* p) {
  const auto stored = *reinterpret_cast<const Vector<scalar_t, V>*>(p);
  Vector<opmath_t<scalar_t>, V> x;
  DK_UNROLL
  for (int v = 0; v < V; ++v) x.v[v] = static_cast<opmath_t<scalar_t>>(stored.v[v]);
  return x;
}

template <int V, typename scalar_t>
DK_INLINE void store(scalar_t* p, const Vector<opmath_t<scalar_t>, V>& x) {
  Vector<scalar_t, V> stored;
  DK_UNROLL
  for (int v = 0; v < V; ++v) stored.v[v] = static_cast<scalar_t>(x.v[v]);
  *reinterpret_cast<Vector<scalar_t, V>*>(p) = stored;
}

// sum += factor * x
template <typename T, int V>
DK_INLINE void add_scaled(Vector<T, V>& sum, T factor, const Vector<T, V>& x) {
  DK_UNROLL
  for (int v = 0; v < V; ++v) sum.v[v] += factor * x.v[v];
}

template <typename T, int V>
DK_INLINE Vector<T, V> scaled(T factor, const Vector<T, V>& x) {
  Vector<T, V> y;
  DK_UNROLL
  for (int v = 0; v < V; ++v) y.v[v] = factor * x.v[v];
  return y;
}

template <typename T, int V>
DK_INLINE Vector<T, V> product(const Vector<T, V>& a, const Vector<T, V>& b) {
  Vector<T, V> x;
  DK_UNROLL
  for (int v = 0; v < V; ++v) x.v[v] = a.v[v] * b.v[v];
  return x;
}

template <typename T, int V>
DK_INLINE Vector<T, V> difference(const Vector<T, V>& a, const Vector<T, V>& b) {
  Vector<T, V> x;
  DK_UNROLL
  for (int v = 0; v < V; ++v) x.v[v] = a.v[v] - b.v[v];
  return x;
}

template <typename T, int V>
DK_INLINE T dot(const Vector<T, V>& a, const Vector<T, V>& b) {
  T sum = a.v[0] * b.v[0];
  DK_UNROLL
  for (int v = 1; v < V; ++v) sum += a.v[v] * b.v[v];
  return sum;
}

// to[v] += x[v], atomically each. `to` is aligned to a vector: since compute capability 9.0, and
// CUDA 12.1, one of four floats is one instruction.
template <typename T, int V>
__device__ __forceinline__ void atomic_add(T* to, const Vector<T, V>& x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && \
    __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
  if constexpr (std::is_same_v<T, float> && V == 4) {
    asm volatile(
        "red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
        "f"(x.v[0]), "f"(x.v[1]), "f"(x.v[2]), "f"(x.v[3])
        : "memory");
    return;
  }
#endif
  DK_UNROLL
  for (int v = 0; v < V; ++v) atomicAdd(to + v, x.v[v]);
}

// ---- sizes --------------------------------------------------------------------------------------

// Kernel and scope size, known to the compiler where K and S are not 0.
template <int K, int S>
struct Sizes {
  int kernel_h, kernel_w, scope_h, scope_w;

  DK_INLINE explicit Sizes(const ConvParams& p)
      : kernel_h(K ? K : p.kernel_h),
        kernel_w(K ? K : p.kernel_w),
        scope_h(S ? S : p.scope_h),
        scope_w(S ? S : p.scope_w) {}
  DK_INLINE int taps() const { return kernel_h * kernel_w; }
  DK_INLINE int cells() const { return scope_h * scope_w; }
};

template <int V>
constexpr int kRow = (kWarpSize + 1) * V;

// channels_last pixels, from the given one on. Their size in bytes has 32 bits (check_sizes), so
// that an address takes no product of 64 bits, which nvcc has to be told.
template <typename scalar_t>
struct Pixels {
  scalar_t* first;
  int bytes;

  DK_INLINE Pixels(scalar_t* first, int channels)
      : first(first), bytes(channels * static_cast<int>(sizeof(scalar_t))) {}
  DK_INLINE scalar_t* operator[](int i) const {
#ifdef __CUDA_ARCH__
    size_t address;
    asm("mad.wide.s32 %0, %1, %2, %3;"
        : "=l"(address)
        : "r"(i), "r"(bytes), "l"(__cvta_generic_to_global(first)));
    return static_cast<scalar_t*>(__cvta_global_to_generic(address));
#else
    return reinterpret_cast<scalar_t*>(reinterpret_cast<int64_t>(first) + int64_t(i) * bytes);
#endif
  }
};

// Distances from the first cell of a 2x2 block to the next one along each axis; 0 where the axis
// has but one cell, whose second coefficient is 0.
struct Steps {
  int64_t h, w;
  DK_INLINE Steps(int64_t height, int64_t width, int64_t cell)
      : h(height > 1 ? width * cell : 0), w(width > 1 ? cell : 0) {}
  DK_INLINE int64_t operator[](int j) const { return (j / 2) * h + (j % 2) * w; }
};

// The 2x2 cells that a thread read last or, without kernel offsets, the one: in registers until
// others are wanted. All threads of a pixel agree on that.
template <typename T, int V, bool kKernel>
struct HeldCells {
  static constexpr int count = kKernel ? 4 : 1;
  int at = -1;
  Vector<T, V> v[count] = {};

  template <typename scalar_t>
  DK_INLINE void hold(int cell, const scalar_t* cells, const Steps& steps) {
    if (cell == at) return;
    at = cell;
    DK_UNROLL
    for (int k = 0; k < count; ++k) v[k] = load<V>(cells + at + steps[k]);
  }
};

// ---- pixels -------------------------------------------------------------------------------------

// A thread's number among those of a pixel, the pixel's among those that its block takes at once,
// and how many these are. Lanes are 8, 16 or 32: a division is twenty instructions.
struct PixelThread {
  int lane, pixel, pixels;

  __device__ __forceinline__ explicit PixelThread(const ChannelTiles& channels) {
    const int bits = channels.lanes == 32 ? 5 : channels.lanes == 16 ? 4 : 3;
    lane = static_cast<int>(threadIdx.x) & (channels.lanes - 1);
    pixel = static_cast<int>(threadIdx.x) >> bits;
    pixels = static_cast<int>(blockDim.x) >> bits;
  }
};

struct Pixel {
  int n, h, w;  // n counts from the first image of the tile
};

// At most kPixels pixels from `first` on, of all N * height * width.
struct PixelTile {
  int64_t first_image;
  int offset, count;  // offset of the first pixel in the first image
  int64_t left;       // pixels from the first on
  int height, width;

  DK_INLINE PixelTile(int64_t first, int64_t batch, int64_t height, int64_t width)
      : first_image(first / (height * width)),
        offset(static_cast<int>(first - first_image * height * width)),
        left(batch * height * width - first),
        height(static_cast<int>(height)),
        width(static_cast<int>(width)) {
    set_count();
  }
  DK_INLINE void advance() {
    left -= kPixels;
    set_count();
    for (offset += kPixels; offset >= height * width; offset -= height * width) ++first_image;
  }
  DK_INLINE Pixel operator[](int i) const {
    const int position = offset + i;
    Pixel pixel{0, position / width, 0};
    pixel.w = position - pixel.h * width;
    for (; pixel.h >= height; pixel.h -= height) ++pixel.n;  // seldom; a division is longer
    return pixel;
  }

 private:
  DK_INLINE void set_count() { count = static_cast<int>(left < kPixels ? left : kPixels); }
};

// ---- taps ---------------------------------------------------------------------------------------

// AxisSample of bilinear.h with its two cells side by side: `cell` and `cell + 1`. A cell outside
// the axis has no coefficient, so the pair may be moved inside.
template <typename T>
struct AxisPair {
  int cell;
  T coef[2], grad[2];
};

template <typename T>
DK_INLINE AxisPair<T> side_by_side(const AxisSample<T>& s) {
  AxisPair<T> pair{s.cell[0], {s.coef[0], s.coef[1]}, {s.grad[0], s.grad[1]}};
  if (s.cell[1] == s.cell[0] + 1) return pair;
  if (s.cell[0] > 0) {  // the last cell is the first of the two
    pair.cell = s.cell[0] - 1;
    pair.coef[0] = pair.grad[0] = T(0);
    pair.coef[1] = s.coef[0];
    pair.grad[1] = s.grad[0];
  } else {  // cell 0 is the second of the two, or the only cell there is
    pair.coef[0] = s.coef[0] + s.coef[1];
    pair.grad[0] = s.grad[0] + s.grad[1];
    pair.coef[1] = pair.grad[1] = T(0);
  }
  return pair;
}

// One tap of one output pixel in two dimensions, in the scope or in the image.
template <typename T>
struct TapSample {
  AxisPair<T> h, w;
  T factor;  // of the tap

  DK_INLINE Vector<T, 4> coef() const {
    const T upper = factor * h.coef[0], lower = factor * h.coef[1];
    return {{upper * w.coef[0], upper * w.coef[1], lower * w.coef[0], lower * w.coef[1]}};
  }
  // Gradients of the row, the column and the factor, given those of the four coefficients.
  DK_INLINE T grad_h(const Vector<T, 4>& g) const {
    return factor * (h.grad[0] * (w.coef[0] * g.v[0] + w.coef[1] * g.v[1]) +
                     h.grad[1] * (w.coef[0] * g.v[2] + w.coef[1] * g.v[3]));
  }
  DK_INLINE T grad_w(const Vector<T, 4>& g) const {
    return factor * (h.coef[0] * (w.grad[0] * g.v[0] + w.grad[1] * g.v[1]) +
                     h.coef[1] * (w.grad[0] * g.v[2] + w.grad[1] * g.v[3]));
  }
  DK_INLINE T grad_factor(const Vector<T, 4>& g) const {
    return h.coef[0] * (w.coef[0] * g.v[0] + w.coef[1] * g.v[1]) +
           h.coef[1] * (w.coef[0] * g.v[2] + w.coef[1] * g.v[3]);
  }
};

template <typename T>
DK_INLINE T* offset_of(const Offset<T>& offset, int64_t n, int t, int h, int w) {
  const OffsetStrides& s = offset.strides;
  return offset.data + n * s.n + 2 * t * s.c + h * s.h + w * s.w;
}

// The factor of tap t, or its gradient.
template <typename T>
DK_INLINE T* factor_of(const Offset<T>& offset, int taps, int64_t n, int t, int h, int w) {
  const OffsetStrides& s = offset.strides;
  return offset.data + n * s.n + (2 * taps + t) * s.c + h * s.h + w * s.w;
}

template <typename T>
DK_INLINE T read_factor(const Offset<const T>& offset, int taps, int64_t n, int t, int h, int w) {
  return offset.modulated ? *factor_of(offset, taps, n, t, h, w) : T(1);
}

template <typename T>
struct Location {
  T h, w;
};

// Tap t of output pixel (h, w) of image n: where it lies in the scope.
template <typename T, typename Sizes>
DK_INLINE Location<T> locate_in_scope(const Sizes& size, const Offset<const T>& offset, int64_t n,
                                      int t, int h, int w) {
  const T* o = offset_of(offset, n, t, h, w);
  const T rest_h = T(size.scope_h - size.kernel_h) / 2 + T(t / size.kernel_w);
  const T rest_w = T(size.scope_w - size.kernel_w) / 2 + T(t % size.kernel_w);
  return {rest_h + o[0], rest_w + o[offset.strides.c]};
}

// What a tap at `at` reads of the scope.
template <typename T, typename Sizes>
DK_INLINE TapSample<T> sample_at(const ConvParams& p, const Sizes& size, const Location<T>& at) {
  return {side_by_side(sample_scope(at.h, size.scope_h, p.clip)),
          side_by_side(sample_scope(at.w, size.scope_w, p.clip)), T(1)};
}

// What a tap reads of the scope. With kFactor, times the tap's factor: those of a convolution with
// both offsets are with its data_offset, and registers that kernels of both do not have are spared.
template <bool kFactor = true, typename T, typename Sizes>
DK_INLINE TapSample<T> sample_weight(const ConvParams& p, const Sizes& size,
                                     const Offset<const T>& offset, int64_t n, int t, int h,
                                     int w) {
  auto sample = sample_at(p, size, locate_in_scope(size, offset, n, t, h, w));
  if constexpr (kFactor) sample.factor = read_factor(offset, size.taps(), n, t, h, w);
  return sample;
}

// Input row (column) that a tap of an output row (column) reads at rest. Positions have 32 bits:
// check_sizes.
DK_INLINE int rest_position(int out, int64_t stride, int64_t pad, int tap, int64_t dilation) {
  return out * static_cast<int>(stride) - static_cast<int>(pad) + tap * static_cast<int>(dilation);
}

// The pixel, counted from the first image of the tile, that tap t of an output pixel reads at rest;
// -1: padding.
template <typename Sizes>
DK_INLINE int rest_pixel(const ConvParams& p, const Sizes& size, int t, const Pixel& out) {
  const int height = static_cast<int>(p.in_h), width = static_cast<int>(p.in_w);
  const int y = rest_position(out.h, p.stride_h, p.pad_h, t / size.kernel_w, p.dilation_h);
  const int x = rest_position(out.w, p.stride_w, p.pad_w, t % size.kernel_w, p.dilation_w);
  const bool inside = y >= 0 && y < height && x >= 0 && x < width;
  return inside ? (out.n * height + y) * width + x : -1;
}

// The same tap, in the image.
template <typename T, typename Sizes>
DK_INLINE TapSample<T> sample_data(const ConvParams& p, const Sizes& size,
                                   const Offset<const T>& offset, int64_t n, int t, int h, int w) {
  const T* o = offset_of(offset, n, t, h, w);
  const T y = T(rest_position(h, p.stride_h, p.pad_h, t / size.kernel_w, p.dilation_h));
  const T x = T(rest_position(w, p.stride_w, p.pad_w, t % size.kernel_w, p.dilation_w));
  const int height = static_cast<int>(p.in_h), width = static_cast<int>(p.in_w);
  return {side_by_side(sample_image(y + o[0], height)),
          side_by_side(sample_image(x + o[offset.strides.c], width)),
          read_factor(offset, size.taps(), n, t, h, w)};
}

// Output row (column) that reads an input row (column) through a tap, or -1.
DK_INLINE int fed_output(int in, int64_t pad, int tap, int64_t dilation, int64_t stride,
                         int64_t size) {
  const int position = in + static_cast<int>(pad) - tap * static_cast<int>(dilation);
  const int step = static_cast<int>(stride);
  if (position < 0) return -1;
  const int out = step == 1 ? position : position / step;  // a division is twenty instructions
  return out * step == position && out < size ? out : -1;
}

// Output pixel and tap number `pair` = p * taps + t.
template <typename Sizes>
DK_INLINE Pixel pixel_of_pair(const ConvParams& p, const Sizes& size, int64_t pair, int64_t* n,
                              int* t) {
  *t = static_cast<int>(pair % size.taps());
  const int64_t pixel = pair / size.taps(), row = pixel / p.out_w;
  *n = row / p.out_h;
  return {0, static_cast<int>(row % p.out_h), static_cast<int>(pixel % p.out_w)};
}

// First position in sorted[0 .. size) that is not below value.
DK_INLINE int64_t lower_bound(const int64_t* sorted, int64_t size, int64_t value) {
  int64_t begin = 0, end = size;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (sorted[middle] < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// ---- shared memory ------------------------------------------------------------------------------

template <typename scalar_t, int V, bool kKernel, bool kData>
struct Shared {
  using T = opmath_t<scalar_t>;
  Vector<T, 4>* kernel_coef;
  Vector<T, 4>* data_coef;
  scalar_t* weight;
  T* weight_sum;
  TapIndex* index;

  DK_INLINE Shared(unsigned char* memory, int taps, int cells, int warps) {
    const SharedLayout s = shared_layout<scalar_t>(V, taps, cells, warps, kKernel, kData);
    kernel_coef = reinterpret_cast<Vector<T, 4>*>(memory + s.kernel_coef);
    data_coef = reinterpret_cast<Vector<T, 4>*>(memory + s.data_coef);
    weight = reinterpret_cast<scalar_t*>(memory + s.weight);
    weight_sum = reinterpret_cast<T*>(memory + s.weight_sum);
    index = reinterpret_cast<TapIndex*>(memory + s.index);
  }

  // The scope of channels begin .. begin + width; nothing past the last channel. Vectors of
  // channels come with a scope that is aligned for vectors of four cells.
  template <int K, int S>
  __device__ __forceinline__ void stage_weight(const Sizes<K, S>& size, const scalar_t* from,
                                               int begin, int width, int channels) const {
    constexpr int N = V > 1 && S > 0 && S * S % 4 == 0 ? 4 : 1;
    const int cells = size.cells();
    const int values = (width < channels - begin ? width : channels - begin) * cells;
    from += static_cast<int64_t>(begin) * cells;
    for (int j = threadIdx.x * N; j < values; j += blockDim.x * N) {
      const auto stored = *reinterpret_cast<const Vector<scalar_t, N>*>(from + j);
      scalar_t* to = weight + j % cells * kRow<V> + j / cells;
      DK_UNROLL
      for (int k = 0; k < N; ++k) to[k * kRow<V>] = stored.v[k];
    }
  }

  // Where the taps of a tile of output pixels read, and how.
  template <typename Sizes>
  __device__ __forceinline__ void fill_output_taps(const ConvParams& p, const Sizes& size,
                                                   const PixelTile& tile,
                                                   const Offset<const T>& kernel_offset,
                                                   const Offset<const T>& data_offset) const {
    const int height = static_cast<int>(p.in_h), width = static_cast<int>(p.in_w);
    // A warp's threads keep their pixels: kPixels is its size.
    const int i = static_cast<int>(threadIdx.x) % kPixels;
    // Of a pixel that the tile does not have, what the last one reads: nobody looks at the result.
    const Pixel q = tile[i < tile.count ? i : tile.count - 1];
    const int64_t n = tile.first_image + q.n;
    for (int j = threadIdx.x; j < size.taps() * kPixels; j += blockDim.x) {
      const int t = j / kPixels;
      TapIndex at{t * kRow<V>, -1};
      if constexpr (kData) {
        const auto sample = sample_data(p, size, data_offset, n, t, q.h, q.w);
        at.pixel = (q.n * height + sample.h.cell) * width + sample.w.cell;
        data_coef[j] = sample.coef();
      } else {
        at.pixel = rest_pixel(p, size, t, q);
      }
      if constexpr (kKernel) {
        const auto sample = sample_weight<!kData>(p, size, kernel_offset, n, t, q.h, q.w);
        at.cell = (sample.h.cell * size.scope_w + sample.w.cell) * kRow<V>;
        kernel_coef[j] = sample.coef();
      }
      index[j] = at;
    }
  }
};

// ---- sums over the threads of a pixel -----------------------------------------------------------

// Sums each v[i] over a group of `lanes` threads (a power of two, >= N). Returns, in the group's
// thread l, the sum of v[l % N]: at each of the first steps a thread hands half of its values to a
// neighbour, so N sums take about N + log2(lanes / N) exchanges instead of N * log2(lanes).
template <int N, typename T>
__device__ __forceinline__ T fold_sum(T (&v)[N], int lanes) {
  DK_UNROLL
  for (int n = N / 2; n > 0; n /= 2) {
    const int distance = N / 2 / n;
    const bool odd = threadIdx.x & distance;
    DK_UNROLL
    for (int i = 0; i < n; ++i) {
      const T kept = odd ? v[2 * i + 1] : v[2 * i];
      const T sent = odd ? v[2 * i] : v[2 * i + 1];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, distance);
    }
  }
  DK_UNROLL
  for (int distance = N; distance < kWarpSize; distance *= 2) {
    if (distance < lanes) v[0] += __shfl_xor_sync(0xffffffffu, v[0], distance);
  }
  return v[0];
}

// ---- dispatch -----------------------------------------------------------------------------------

template <int v>
using Int = std::integral_constant<int, v>;

// Calls f(Int<K>, Int<S>) with the sizes that have kernels of their own, else with zeros.
template <bool kKernel, typename F>
void dispatch_sizes(const ConvParams& p, const F& f) {
  const bool three = p.kernel_h == 3 && p.kernel_w == 3, square = p.scope_h == p.scope_w;
  if constexpr (kKernel) {
    if (three && square && p.scope_h == 3) return f(Int<3>(), Int<3>());
    if (three && square && p.scope_h == 4) return f(Int<3>(), Int<4>());
    if (three && square && p.scope_h == 5) return f(Int<3>(), Int<5>());
  } else {
    if (three) return f(Int<3>(), Int<3>());
  }
  f(Int<0>(), Int<0>());
}

// Calls f(has kernel_offset, has data_offset) with compile-time answers.
template <typename F>
void dispatch_offsets(bool kernel, bool data, const F& f) {
  if (kernel && data)
    f(std::true_type(), std::true_type());
  else if (kernel)
    f(std::true_type(), std::false_type());
  else if (data)
    f(std::false_type(), std::true_type());
  else
    f(std::false_type(), std::false_type());
}

}  // namespace cuda
}  // namespace dk

// What the CUDA host functions (deform_kernel_cuda.cpp) hand to the kernels (*.cuh). Plain C++:
// read by both compilers.
#pragma once

#include <cuda_runtime.h>

#include "../bilinear.h"
#include "../deform_kernel.h"

namespace dk {

namespace cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;
// Pixels whose coefficients a block holds at a time; a multiple of the pixels that it works on at
// once.
constexpr int kPixels = 32;
// Neighbouring pixels that a thread takes at once. For a tap they mostly read the same cells.
constexpr int kHeldPixels = 4;

// Of the kernels on tensor cores: the most taps, and rows of the scope; rows and columns of a tile
// of pixels, a block's threads, and of backward, lanes.
constexpr int kMatrixTaps = 9, kScopeRows = 4;
constexpr int kMatrixRows = 4, kMatrixColumns = 8, kMatrixThreads = 128, kBackwardLanes = 16;
// Their blocks at once on a multiprocessor, by registers: of 128 a thread, of 168 and, of float16,
// whose numbers are split, of 255 (measured: docs/cuda.md).
constexpr int kForwardBlocks = 4;
template <typename scalar_t>
constexpr int kBackwardBlocks = std::is_same_v<scalar_t, c10::BFloat16> ? 3 : 2;

DK_INLINE int64_t pixel_tiles(int64_t pixels) { return (pixels + kPixels - 1) / kPixels; }
DK_INLINE int64_t matrix_tiles(int64_t batch, int64_t height, int64_t width) {
  return batch * ((height + kMatrixRows - 1) / kMatrixRows) *
         ((width + kMatrixColumns - 1) / kMatrixColumns);
}

// How the channels are dealt out: a thread takes `vector` neighbouring ones, `lanes` threads of one
// warp (8, 16 or 32) make a tile, and `tiles` tiles cover all. kPixels / kHeldPixels * lanes
// threads take all pixels of a tile at once.
struct ChannelTiles {
  int vector, lanes, tiles;
};

// Bytes of shared memory, and where its arrays begin:
//   kernel_coef, data_coef  [taps, kPixels, 4]         T         if there is such an offset
//   weight                  [cells, row]               scalar_t
//   weight_sum              [warps, cells, row]        T         backward only
//   index                   [taps, kPixels]            TapIndex
// A row is one vector longer than a warp's channels, so that a column's cells lie in different
// banks.
struct SharedLayout {
  size_t kernel_coef, data_coef, weight, weight_sum, index, bytes;
};

// The 2x2 block of cells a tap reads begins at `cell` of the scope (times the row's length) and
// `pixel` of the image, counted from the first image of the block; pixel < 0: the tap reads
// padding.
struct TapIndex {
  int cell, pixel;
};

template <typename scalar_t>
DK_INLINE SharedLayout shared_layout(int vector, int taps, int cells, int warps, bool kernel,
                                     bool data) {
  using T = opmath_t<scalar_t>;
  const size_t coef = sizeof(T) * 4 * taps * kPixels;
  const size_t row = static_cast<size_t>(cells) * (kWarpSize + 1) * vector;
  SharedLayout s;
  s.kernel_coef = 0;
  s.data_coef = s.kernel_coef + (kernel ? coef : 0);
  s.weight = s.data_coef + (data ? coef : 0);
  s.weight_sum = s.weight + (row * sizeof(scalar_t) + 15) / 16 * 16;
  s.index = s.weight_sum + (row * sizeof(T) * warps + 15) / 16 * 16;
  s.bytes = s.index + sizeof(TapIndex) * taps * kPixels;
  return s;
}

// Activations are channels_last: [N, H, W, C]; for forward_nchw, contiguous. The weight is
// contiguous: [C, S_h*S_w].
template <typename scalar_t>
struct ForwardArgs {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  const scalar_t* weight;
  const scalar_t* bias;  // null: none
  Offset<const T> kernel_offset, data_offset;
  scalar_t* output;
  ChannelTiles channels;
};

// How things are dealt out: `size` to everyone, to the first `longer` one more.
struct Parts {
  int64_t size, longer;

  Parts() = default;
  Parts(int64_t things, int64_t parts) : size(things / parts), longer(things % parts) {}
  DK_INLINE int64_t first(int64_t part) const {
    return part * size + (part < longer ? part : longer);
  }
};

// Of an offset, one group's after another, `size` elements each; zero at the start.
template <typename T>
struct OffsetGradients {
  Offset<T> first;
  int64_t size = 0;
};

template <typename scalar_t>
struct BackwardArgs {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  const scalar_t* weight;
  Offset<const T> kernel_offset, data_offset;
  const scalar_t* grad_output;
  ChannelTiles channels;
  // Block (split, group) takes the pixels of a split and the channel tiles of a group. Sums over
  // pixels come out per split, sums over channels per group.
  int splits, groups, warps;
  Parts tiles_of_split, channels_of_group;
  T* weight_partial;  // [splits, S_h*S_w, C]
  OffsetGradients<T> grad_kernel_offset, grad_data_offset;
  scalar_t* grad_input;  // without data_offset
  T* grad_input_sum;     // with data_offset: zero at the start; may be null
};

// The compute capability that the code on this GPU was compiled for, as 10 * major + minor: lower
// than the GPU's own where it took the PTX of an older one. Not remembered, since a process may
// have several GPUs, and a query costs little beside a launch.
int compiled_for();  // in forward_float.cu: every .cu is compiled for the same
// Below it, the kernels on tensor cores are but a trap (mma.cuh).
constexpr int kTensorCores = 80;

// ---- launchers, one instantiation per type in its own .cu ---------------------------------------

template <typename scalar_t>
void launch_forward(const ForwardArgs<scalar_t>& a, cudaStream_t stream);
// Contiguous activations; kernel_offset, no data_offset, K = 3 and S = 3, 4 or 5.
template <typename scalar_t>
void launch_forward_nchw(const ForwardArgs<scalar_t>& a, cudaStream_t stream);
// On tensor cores: float32, float16 or bfloat16; kernel_offset without factors, no data_offset,
// K = 3 and S = 3 or 4, vectors of 16 bytes.
template <typename scalar_t>
void launch_forward_matrix(const ForwardArgs<scalar_t>& a, cudaStream_t stream);
// Every gradient if there is no data_offset; else those of the offsets, the weight's partial sums,
// and, by atomics, the input's if grad_input_sum is given.
template <typename scalar_t>
void launch_backward(const BackwardArgs<scalar_t>& a, cudaStream_t stream);
// Every gradient on tensor cores, of what launch_forward_matrix takes in 16 bits; kBackwardLanes.
template <typename scalar_t>
void launch_backward_matrix(const BackwardArgs<scalar_t>& a, cudaStream_t stream);
// The gradient of kernel_offset under `clip`, in place, from that of the edges which the taps read:
// summed over all groups.
template <typename scalar_t>
void launch_turn_inward(const BackwardArgs<scalar_t>& a, const Offset<opmath_t<scalar_t>>& grad,
                        cudaStream_t stream);
// grad_weight [C, S_h*S_w] from weight_partial.
template <typename scalar_t>
void launch_sum_weight(const BackwardArgs<scalar_t>& a, scalar_t* grad_weight, cudaStream_t stream);
// The deterministic gradient of the input under a data_offset, in two steps around a stable sort:
// base[p*taps + t] = the first of the 2x2 pixels that tap t of output pixel p reads; then, with the
// sorted bases and the (p, t) they came from, every input pixel gathers in that order.
template <typename scalar_t>
void launch_base_pixels(const BackwardArgs<scalar_t>& a, int64_t* base, cudaStream_t stream);
template <typename scalar_t>
void launch_gather_grad_input(const BackwardArgs<scalar_t>& a, const int64_t* sorted_base,
                              const int64_t* pair, scalar_t* grad_input, cudaStream_t stream);

}  // namespace cuda
}  // namespace dk

// Kernels with one fault each, at the line that says so, for tests/test_ptx_machine.py.
// `x` and `y` have 64 floats, of which y's are never written; and so has shared memory, `s`.
#define KERNEL extern "C" __global__ void

extern __shared__ float s[];

KERNEL sound(float* x, float* y, int) {
  const int i = threadIdx.x;
  s[i] = x[i];
  __syncthreads();
  float sum = s[63 - i];
  for (int lane = 1; lane < 32; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  __syncthreads();
  s[i] = sum;
  __syncwarp();
  y[blockIdx.x * 64 + i] = s[i ^ 1];
  atomicAdd(x, 1.0f);
}

KERNEL numbered(float*, float* y, int) { y[blockIdx.x * 64 + threadIdx.x] = blockIdx.x + 1; }

KERNEL beyond_global(float* x, float*, int) {
  x[threadIdx.x + 1] = 0;  // fault
}

KERNEL beyond_shared(float* x, float*, int) {
  s[threadIdx.x + 1] = x[threadIdx.x];  // fault
}

KERNEL before_shared(float* x, float*, int n) {
  s[static_cast<int>(threadIdx.x) - n] = x[threadIdx.x];  // fault
}

KERNEL misaligned(float* x, float* y, int) {
  const float4 four = *reinterpret_cast<float4*>(x + 1);  // fault
  y[threadIdx.x] = four.x + four.y + four.z + four.w;
}

KERNEL unwritten_global(float* x, float* y, int) {
  x[threadIdx.x] = y[threadIdx.x];  // fault
}

KERNEL unwritten_shared(float* x, float*, int) {
  x[threadIdx.x] = s[threadIdx.x];  // fault
}

KERNEL race_read_after_write(float* x, float*, int) {
  s[threadIdx.x] = 1;
  x[threadIdx.x] = s[63 - threadIdx.x];  // fault
}

KERNEL race_write_after_read(float* x, float*, int) {
  const float other = x[63 - threadIdx.x];
  x[threadIdx.x] = other;  // fault
}

KERNEL race_in_warp(float* x, float*, int) {
  s[threadIdx.x] = 1;
  x[threadIdx.x] = s[threadIdx.x ^ 1];  // fault
}

KERNEL race_between_blocks(float* x, float*, int) {
  if (threadIdx.x == 0) x[0] = blockIdx.x;  // fault
}

KERNEL race_with_atomic(float* x, float*, int) {
  x[threadIdx.x] = 0;
  atomicAdd(x, 1.0f);  // fault
}

KERNEL barrier_after_return(float*, float*, int n) {
  if (threadIdx.x < n) return;
  __syncthreads();  // fault
}

KERNEL different_barriers(float* x, float* y, int n) {
  if (threadIdx.x < 32) {
    x[threadIdx.x] = 0;
    __syncthreads();  // fault
    atomicAdd(x, 1.0f);
  } else {
    y[threadIdx.x] = n;
    __syncthreads();  // fault
  }
}

KERNEL shuffle_after_return(float* x, float*, int n) {
  if (threadIdx.x % 32 < n) return;
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);  // fault
}

KERNEL warp_waits_in_vain(float* x, float*, int n) {
  if (threadIdx.x % 32 < n) {
    __syncwarp();  // fault
    x[threadIdx.x] = 0;
  }
  __syncthreads();
}

KERNEL division_by_zero(float* x, float*, int n) {
  x[threadIdx.x] = static_cast<int>(threadIdx.x) / (n - 1);  // fault
}

KERNEL without_end(float* x, float*, int n) {
  while (n) atomicAdd(x, 1.0f);  // fault
}

extern "C" __global__ void __launch_bounds__(32) too_many_threads(float*, float*, int) {}

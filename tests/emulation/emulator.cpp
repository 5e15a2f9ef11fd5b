// Runs the blocks of a grid on the CPU, each thread a fiber that runs until it has to wait.
//
// DK_EMULATED_ORDER  in which order fibers and blocks get their turn: forward, reverse, or another
//                    word, a seed: then at random, a fiber being passed over every other time.
// A kernel with all its barriers gives the same bits in every order.
#include "stable.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#define DK_FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(DK_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

// ---- switching ----------------------------------------------------------------------------------

#if DK_FAST_SWITCH
// swapcontext() makes a system call each time; a warp shuffle of a whole block would make hundreds.
extern "C" void dk_emulated_switch(void** save, void* to);
asm(R"(
.text
.type dk_emulated_switch,@function
dk_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dk_emulated_switch,.-dk_emulated_switch
)");
#endif

namespace emulated {

thread_local dim3 thread_index, block_index, block_size, grid_size;
thread_local unsigned char* shared_memory;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStack = 512 * 1024;
#elif defined(DK_THREAD_SANITIZER)
constexpr std::size_t kStack = 128 * 1024;
#else
constexpr std::size_t kStack = 64 * 1024;
#endif
constexpr int kWarp = 32;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Context {
#if DK_FAST_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(DK_THREAD_SANITIZER)
  void* fiber = nullptr;
#endif
  const void* stack = nullptr;
  std::size_t stack_size = 0;
};

struct Fiber : Context {
  std::unique_ptr<unsigned char[]> memory{new unsigned char[kStack]};
  State state = State::ready;
  dim3 index;
  int tag = 0;  // of the warp barrier it waits at
  unsigned exchanges = 0, block_barriers = 0, warp_barriers = 0;
  std::deque<Copy> copies;
  const char* error = nullptr;
};

struct Warp {
  // Exchanges alternate: a slot is free again after the next barrier.
  alignas(std::max_align_t) unsigned char slot[2][kWarp * kMostGiven];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Context scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  // What the thread sanitizer knows of order, as addresses: the launch, its end, and for each block
  // its barriers, then its warps'. Two by turns: who leaves one has not yet heard of the next.
  char launched, finished;
  std::vector<std::array<char, 2>> barriers;
  // The thread sanitizer's: a stack that two blocks used would look like memory that they share.
  std::vector<std::unique_ptr<unsigned char[]>> old_stacks;

  char* barrier(std::size_t which, unsigned count) {
    return &barriers[block_index.x * (1 + warps.size()) + which][count % 2];
  }
};

Block block;

// This file is not instrumented itself (build.py): the scheduler's accesses are no threads'.
[[maybe_unused]] void acquire(void* address) {
#if defined(DK_THREAD_SANITIZER)
  __tsan_acquire(address);
#endif
}
[[maybe_unused]] void release(void* address) {
#if defined(DK_THREAD_SANITIZER)
  __tsan_release(address);
#endif
}

// `last`: `from` is never resumed.
void switch_to(Context& from, Context& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(DK_THREAD_SANITIZER)
  // Without synchronisation: a barrier, not the scheduler, orders the accesses of two threads.
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if DK_FAST_SWITCH
  dk_emulated_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void to_scheduler(bool last = false) {
  Fiber& self = *block.current;
  switch_to(self, block.scheduler, last);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  block.scheduler.stack = stack;
  block.scheduler.stack_size = size;
#endif
  acquire(&block.launched);
  (*block.kernel)();
  release(&block.finished);
  block.current->state = State::done;
  to_scheduler(/*last=*/true);
  std::abort();
}

void start(Fiber& f) {
  f.state = State::ready;
  f.exchanges = f.block_barriers = f.warp_barriers = 0;
  f.copies.clear();
  f.error = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.memory.get(), kStack);
  f.fake_stack = nullptr;
#endif
#if defined(DK_THREAD_SANITIZER)
  if (f.fiber) __tsan_destroy_fiber(f.fiber);
  block.old_stacks.push_back(
      std::exchange(f.memory, std::make_unique_for_overwrite<unsigned char[]>(kStack)));
  f.fiber = __tsan_create_fiber(0);
#endif
  f.stack = f.memory.get();
  f.stack_size = kStack;
#if DK_FAST_SWITCH
  // As dk_emulated_switch left it: six registers, the return address, a stack aligned as at a call.
  auto top = reinterpret_cast<std::uintptr_t>(f.memory.get() + kStack) / 16 * 16;
  auto frame = reinterpret_cast<void**>(top) - 8;
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  f.stack_pointer = frame;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.memory.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

// ---- scheduling ---------------------------------------------------------------------------------

class Order {
 public:
  Order() {
    const char* name = std::getenv("DK_EMULATED_ORDER");
    name_ = name && *name ? name : "forward";
    random_.seed(static_cast<unsigned>(std::hash<std::string>()(name_)));
  }
  bool is_random() const { return name_ != "forward" && name_ != "reverse"; }
  void arrange(std::vector<unsigned>& turns) {
    std::iota(turns.begin(), turns.end(), 0u);
    if (name_ == "reverse") std::reverse(turns.begin(), turns.end());
    if (is_random()) std::shuffle(turns.begin(), turns.end(), random_);
  }
  bool pass_over() { return is_random() && random_() & 1; }

 private:
  std::string name_;
  std::mt19937 random_;
};

[[noreturn]] void fail(const std::string& what) {
  acquire(&block.finished);  // what returned threads did comes before the launch's memory is freed
  throw std::runtime_error("emulated CUDA, block " + std::to_string(block_index.x) + ": " + what);
}

int count(std::size_t begin, std::size_t end, State state) {
  int n = 0;
  for (std::size_t i = begin; i < end; ++i) n += block.fibers[i].state == state;
  return n;
}

// Lets every warp and the block pass the barrier that all their threads have reached.
bool release_barriers(std::size_t threads) {
  bool released = false;
  for (std::size_t begin = 0; begin < threads; begin += kWarp) {
    if (count(begin, begin + kWarp, State::at_warp_barrier) < kWarp) continue;
    for (std::size_t i = begin; i < begin + kWarp; ++i) {
      if (block.fibers[i].tag != block.fibers[begin].tag)
        fail("the lanes of a warp wait for different things");
      block.fibers[i].state = State::ready;
    }
    released = true;
  }
  if (count(0, threads, State::at_block_barrier) == static_cast<int>(threads)) {
    for (std::size_t i = 0; i < threads; ++i) block.fibers[i].state = State::ready;
    released = true;
  }
  return released;
}

void run_block(std::size_t threads, Order& order, std::vector<unsigned>& turns) {
  for (std::size_t i = 0; i < threads; ++i) start(block.fibers[i]);
  while (count(0, threads, State::done) < static_cast<int>(threads)) {
    order.arrange(turns);
    bool ran = false, passed_over = false;
    for (unsigned i : turns) {
      Fiber& f = block.fibers[i];
      if (f.state != State::ready) continue;
      if (order.pass_over()) {
        passed_over = true;
        continue;
      }
      ran = true;
      block.current = &f;
      thread_index = f.index;
      switch_to(block.scheduler, f);
      if (f.error) fail(f.error);
      if (f.state == State::done && !f.copies.empty()) {
        fail("a thread returns before its copies are there");
      }
    }
    if (!release_barriers(threads) && !ran && !passed_over) {
      fail("stuck: " + std::to_string(count(0, threads, State::at_block_barrier)) +
           " threads wait at __syncthreads, " +
           std::to_string(count(0, threads, State::at_warp_barrier)) + " at a warp barrier, " +
           std::to_string(count(0, threads, State::done)) + " have returned");
    }
  }
}

void wait(State state) {
  block.current->state = state;
  to_scheduler();
}

}  // namespace

void yield() { wait(State::ready); }

// An exception of its own would not leave the fiber.
void refuse(const char* what) {
  block.current->error = what;
  release(&block.finished);
  to_scheduler();
  std::abort();
}

void remember(const Copy& copy) { block.current->copies.push_back(copy); }

bool recall(Copy* copy) {
  auto& copies = block.current->copies;
  if (copies.empty()) return false;
  *copy = copies.front();
  copies.pop_front();
  return true;
}

void block_barrier() {
  char* barrier = block.barrier(0, block.current->block_barriers++);
  release(barrier);
  wait(State::at_block_barrier);
  acquire(barrier);
}

void warp_barrier(int tag) {
  char* barrier = block.barrier(1 + thread_index.x / kWarp, block.current->warp_barriers++);
  block.current->tag = tag;
  release(barrier);
  wait(State::at_warp_barrier);
  acquire(barrier);
}

const void* gather(const void* mine, std::size_t bytes, int tag) {
  unsigned char* slot = block.warps[thread_index.x / kWarp].slot[block.current->exchanges++ % 2];
  std::memcpy(slot + bytes * (thread_index.x % kWarp), mine, bytes);
  warp_barrier(tag);
  return slot;
}

int& shared_limit(void* kernel) {
  static std::map<void*, int> limits;
  return limits.try_emplace(kernel, 48 * 1024).first->second;
}

void check_shape(dim3 grid, dim3 threads) {
  if (grid.y * grid.z * threads.y * threads.z != 1 || threads.x % kWarp) {
    throw std::runtime_error("emulated CUDA: one dimension and whole warps only");
  }
}

// Takes a launch: the kernel's mangled name, the launch's shape, and its arguments with their
// sizes. Returns whether it did.
using Launcher = int (*)(const char* name, unsigned grid, unsigned block, std::size_t shared_bytes,
                         int count, void** args, const std::size_t* sizes);
Launcher launcher = nullptr;

bool launched_elsewhere(void* kernel, dim3 grid, dim3 threads, std::size_t shared_bytes, int count,
                        void** args, const std::size_t* sizes) {
  if (!launcher) return false;
  check_shape(grid, threads);
  Dl_info info{};
  dladdr(kernel, &info);
  return launcher(info.dli_sname, grid.x, threads.x, shared_bytes, count, args, sizes);
}

void run_grid(dim3 grid, dim3 threads, std::size_t shared_bytes,
              const std::function<void()>& kernel) {
  check_shape(grid, threads);
  Order order;
  grid_size = grid;
  block_size = threads;
  block.kernel = &kernel;
  if (block.fibers.size() < threads.x) block.fibers.resize(threads.x);
  block.warps.resize(threads.x / kWarp);
  for (unsigned i = 0; i < threads.x; ++i) block.fibers[i].index = dim3(i, 0, 0);
#if defined(DK_THREAD_SANITIZER)
  block.scheduler.fiber = __tsan_get_current_fiber();
#endif
  block.barriers.resize(grid.x * (1 + block.warps.size()));
  release(&block.launched);
  std::vector<unsigned> blocks(grid.x), turns(threads.x);
  order.arrange(blocks);
  std::vector<std::unique_ptr<void, decltype(&std::free)>> shared;
  for (unsigned b : blocks) {
    // Fresh and exactly as large as asked for: what is read before it is written shows, and so
    // does, under the address sanitizer, what lies outside.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes ? shared_bytes : 1)) throw std::bad_alloc();
#if !defined(DK_THREAD_SANITIZER)  // to which freeing it would be a race, or an order of blocks
    shared.clear();
#endif
    shared.emplace_back(memory, &std::free);
    std::memset(memory, 0xff, shared_bytes);
    shared_memory = static_cast<unsigned char*>(memory);
    block_index = dim3(b, 0, 0);
    run_block(threads.x, order, turns);
  }
  acquire(&block.finished);
  block.old_stacks.clear();
}

}  // namespace emulated

// ---- runtime ------------------------------------------------------------------------------------

namespace {
int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoi(value) : otherwise;
}
}  // namespace

cudaError_t emulated_launch_error() {
  return static_cast<cudaError_t>(from_environment("DK_EMULATED_LAUNCH_ERROR", 0));
}

int emulated_ptx_version() { return from_environment("DK_EMULATED_PTX_VERSION", 90); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = from_environment("DK_EMULATED_PROCESSORS", 2);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = from_environment("DK_EMULATED_SHARED_BYTES", 227 * 1024);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}

extern "C" void dk_emulated_set_launcher(emulated::Launcher launcher) {
  emulated::launcher = launcher;
}

// ---- the C shim's part for CUDA -----------------------------------------------------------------

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  if (error) *message = strdup(("emulated CUDA error " + std::to_string(error)).c_str());
  return TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

}  // extern "C"

// parallel_for by four threads that begin and end here. To ThreadSanitizer, which does not know
// OpenMP's barriers, torch's own would look like one race.
#include "stable.h"

#include <algorithm>
#include <thread>
#include <vector>

constexpr uint32_t kThreads = 4;

extern "C" AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = kThreads;
  return TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc run,
                                             void* context) {
  std::vector<std::thread> threads;
  const int64_t share = (end - begin + kThreads - 1) / kThreads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back(run, first, std::min(first + share, end), context);
  }
  for (std::thread& thread : threads) thread.join();
  return TORCH_SUCCESS;
}

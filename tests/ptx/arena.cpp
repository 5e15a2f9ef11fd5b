// Memory for the PTX tests: while it is on, every tensor gets bytes of its own here, of known size,
// poisoned, with gaps in between, so that device.py knows what a kernel may touch.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <new>

namespace {

constexpr std::size_t kCapacity = std::size_t(1) << 31, kGap = 512;
constexpr unsigned char kPoison = 0xA5;

struct Arena : c10::Allocator {
  char* base = static_cast<char*>(mmap(nullptr, kCapacity, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  std::size_t used = 0;
  bool on = false;
  std::map<char*, std::size_t> live;

  c10::DataPtr allocate(std::size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Arena arena;
c10::Allocator* usual = nullptr;

void release(void* p) { arena.live.erase(static_cast<char*>(p)); }

// For oneDNN, which keeps bare pointers, from here or from the usual allocator.
void release_any(void* p) {
  if (!arena.live.erase(static_cast<char*>(p))) usual->raw_deallocate(p);
}

c10::DeleterFnPtr Arena::raw_deleter() const { return &release_any; }

c10::DataPtr Arena::allocate(std::size_t bytes) {
  if (!on || !bytes) return usual->allocate(bytes);
  if (used + bytes + 3 * kGap > kCapacity) throw std::bad_alloc();
  char* p = base + used + kGap;
  used += (bytes + 2 * kGap - 1) / kGap * kGap;
  std::memset(p, kPoison, bytes);
  live[p] = bytes;
  return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
}

}  // namespace

extern "C" {

// Switches the arena; it starts anew once no tensor lives there.
void arena_switch(int on) {
  if (!usual) {
    usual = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&arena, /*priority=*/100);
  }
  if (on && arena.live.empty()) arena.used = 0;
  arena.on = on;
}

char* arena_base() { return arena.base; }
std::size_t arena_used() { return arena.used + kGap; }

// Where at most `most` of its tensors are; returns their number.
int arena_tensors(char** begin, std::size_t* bytes, int most) {
  int n = 0;
  for (const auto& [p, size] : arena.live) {
    if (n == most) break;
    begin[n] = p;
    bytes[n++] = size;
  }
  return n;
}

}  // extern "C"

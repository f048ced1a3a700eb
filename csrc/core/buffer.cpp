#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "core/block.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mnv4 {
namespace {

constexpr std::size_t kChunk = 2 * kHugePage;

std::atomic<bool> pooled{false};

// The chunk that is being filled. A chunk goes back to the system with its last buffer.
struct Pool {
  std::mutex lock;
  std::shared_ptr<void> chunk;
  std::size_t used = 0, size = 0;
};

Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

Buffer from_pool(std::size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> hold(p.lock);
  if (p.chunk == nullptr || p.size - p.used < bytes) {
    const std::size_t size = std::max(kChunk, (bytes + kHugePage - 1) / kHugePage * kHugePage);
    void* memory = std::aligned_alloc(kHugePage, size);
    if (memory == nullptr) return nullptr;
    advise_huge(memory, size);
    p.chunk = std::shared_ptr<void>(memory, [](void* m) { std::free(m); });
    p.used = 0, p.size = size;
  }
  float* start = reinterpret_cast<float*>(static_cast<char*>(p.chunk.get()) + p.used);
  p.used += bytes;
  return Buffer(start, AlignedFree{p.chunk});
}

}  // namespace

void AlignedFree::operator()(float* p) const {
  if (chunk == nullptr) std::free(p);
}

void advise_huge(void* p, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(p, bytes, MADV_HUGEPAGE);  // a wish: refused where the system has none
#else
  (void)p;
  (void)bytes;
#endif
}

void pool_buffers() { pooled.store(true, std::memory_order_relaxed); }

Buffer make_buffer(std::size_t floats) {
  const std::size_t bytes = (std::max<std::size_t>(floats, 16) * sizeof(float) + 63) / 64 * 64;
  Buffer b = pooled.load(std::memory_order_relaxed)
                 ? from_pool(bytes)
                 : Buffer(static_cast<float*>(std::aligned_alloc(64, bytes)), AlignedFree{});
  if (b != nullptr) std::memset(b.get(), 0, bytes);
  return b;
}

}  // namespace mnv4

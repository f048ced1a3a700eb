// Packed parameters between guard pages: the linker sends the library's aligned_alloc and free here (--wrap, see
// CMakeLists.txt).
#include <map>
#include <mutex>

#include "support.h"

#if defined(MNV4_OPS_WRAP_ALLOC)

namespace {

struct Allocations {
  std::mutex lock;
  std::map<void*, mnv4::test::Pages*> live;
};

Allocations& allocations() {
  static Allocations* all = new Allocations;
  return *all;
}

}  // namespace

extern "C" {

void __real_free(void* p);

void* __wrap_aligned_alloc(std::size_t, std::size_t bytes) {
  mnv4::test::Pages* pages = new mnv4::test::Pages(bytes, mnv4::test::packed_at_end);
  const std::lock_guard<std::mutex> hold(allocations().lock);
  allocations().live[pages->data()] = pages;
  return pages->data();
}

void __wrap_free(void* p) {
  {
    const std::lock_guard<std::mutex> hold(allocations().lock);
    const auto found = allocations().live.find(p);
    if (found != allocations().live.end()) {
      CHECK(found->second->intact(), "floats beside the packed parameters were written");
      delete found->second;
      allocations().live.erase(found);
      return;
    }
  }
  __real_free(p);
}
}

#endif

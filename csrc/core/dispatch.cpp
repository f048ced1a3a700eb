#include <atomic>
#include <cstring>

#include "core/cpu_features.h"
#include "core/kernels.h"

namespace mnv4 {
namespace {

std::atomic<const KernelTable*> active{nullptr};

}  // namespace

int available_tiers(const KernelTable** out, int max) {
  const CpuInfo& cpu = cpu_info();
  int n = 0;
  auto add = [&](bool can, const KernelTable& t) {
    if (can && n < max) out[n++] = &t;
  };
  add(true, scalar_kernels());
#if defined(MNV4_OPS_HAVE_AVX2)
  add(cpu.avx2, avx2_kernels());
#endif
#if defined(MNV4_OPS_HAVE_AVX512)
  add(cpu.avx512, avx512_kernels());
#endif
#if defined(MNV4_OPS_HAVE_NEON)
  add(cpu.neon, neon_kernels());
#endif
#if defined(MNV4_OPS_HALF)
  // what runs in fp32 is the same; models in fp16 are served as well
  static const KernelTable fp16 = [] {
    KernelTable t = neon_kernels();
    t.name = neon_fp16_kernels().name;
    return t;
  }();
  add(cpu.neon_fp16, fp16);
#endif
  return n;
}

#if defined(MNV4_OPS_HALF)
const BasicKernels<Half>* half_kernels() { return cpu_info().neon_fp16 ? &neon_fp16_kernels() : nullptr; }
#endif

const KernelTable& active_kernels() {
  const KernelTable* t = active.load(std::memory_order_acquire);
  if (t == nullptr) {
    const KernelTable* tiers[8] = {};
    t = tiers[available_tiers(tiers, 8) - 1];
    active.store(t, std::memory_order_release);
  }
  return *t;
}

bool has_winograd() {
  static const bool all = [] {
    const KernelTable* tiers[8] = {};
    const int n = available_tiers(tiers, 8);
    for (int i = 0; i < n; ++i) {
      if (tiers[i]->winograd_input == nullptr) return false;
    }
    return true;
  }();
  return all;
}

bool force_tier(const char* name) {
  const KernelTable* tiers[8] = {};
  const int n = available_tiers(tiers, 8);
  for (int i = 0; i < n; ++i) {
    if (std::strcmp(tiers[i]->name, name) == 0) {
      active.store(tiers[i], std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace mnv4

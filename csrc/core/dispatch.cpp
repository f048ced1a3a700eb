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
  // what runs in fp32 is the same; models in fp16 are served as well, and then those in bf16
  const auto named = [](const char* name) {
    KernelTable t = neon_kernels();
    t.name = name;
    return t;
  };
  static const KernelTable fp16 = named(neon_fp16_kernels().name), bf16 = named(neon_bf16_kernels().name);
  add(cpu.neon_fp16, fp16);
  add(cpu.neon_bf16, bf16);
#endif
  return n;
}

const KernelTable& active_kernels() {
  const KernelTable* t = active.load(std::memory_order_acquire);
  if (t == nullptr) {
    const KernelTable* tiers[8] = {};
    t = tiers[available_tiers(tiers, 8) - 1];
    active.store(t, std::memory_order_release);
  }
  return *t;
}

template <>
const KernelTable* kernels_for<float>() {
  return &active_kernels();
}
#if defined(MNV4_OPS_HALF)
template <>
const BasicKernels<Half>* kernels_for<Half>() {
  return cpu_info().neon_fp16 ? &neon_fp16_kernels() : nullptr;
}
template <>
const BasicKernels<BFloat16>* kernels_for<BFloat16>() {
  return cpu_info().neon_bf16 ? &neon_bf16_kernels() : nullptr;
}
#endif

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

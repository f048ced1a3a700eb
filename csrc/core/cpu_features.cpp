#include "core/cpu_features.h"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace mnv4 {
namespace {

void add(CpuInfo& info, bool present, const char* name) {
  if (present) info.features.emplace_back(name);
}

#if defined(__x86_64__)

struct Regs {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Regs cpuid(unsigned leaf, unsigned sub = 0) {
  Regs r;
  if (__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d) == 0) return Regs{};
  return r;
}

bool bit(unsigned reg, int i) { return (reg >> i & 1u) != 0; }

std::uint64_t xgetbv0() {
  std::uint32_t lo, hi;
  __asm__ __volatile__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<std::uint64_t>(hi) << 32 | lo;
}

void detect_isa(CpuInfo& info) {
  const Regs l1 = cpuid(1), l7 = cpuid(7), l71 = cpuid(7, 1);
  const std::uint64_t xcr0 = bit(l1.c, 27) ? xgetbv0() : 0;
  const bool ymm = (xcr0 & 0x6) == 0x6;
  const bool zmm = (xcr0 & 0xe6) == 0xe6;
  const bool avx2 = ymm && bit(l1.c, 28) && bit(l7.b, 5), fma = ymm && bit(l1.c, 12);
  const bool f = zmm && bit(l7.b, 16), dq = f && bit(l7.b, 17), bw = f && bit(l7.b, 30), vl = f && bit(l7.b, 31);
  info.avx2 = avx2 && fma;
  info.avx512 = info.avx2 && f && bw && dq && vl;
  add(info, bit(l1.c, 20), "sse4.2");
  add(info, avx2, "avx2");
  add(info, fma, "fma");
  add(info, ymm && bit(l1.c, 29), "f16c");
  add(info, f, "avx512f");
  add(info, bw, "avx512bw");
  add(info, dq, "avx512dq");
  add(info, vl, "avx512vl");
  add(info, f && bit(l7.c, 11), "avx512vnni");
  add(info, f && bit(l71.a, 5), "avx512bf16");
  add(info, f && bit(l7.d, 23), "avx512fp16");
  add(info, ymm && bit(l71.a, 4), "avxvnni");
  add(info, (xcr0 & 0x60000) == 0x60000 && bit(l7.d, 24), "amx");

  char brand[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Regs r = cpuid(0x80000002 + i);
    std::memcpy(brand + 16 * i, &r, 16);
  }
  info.model = brand;
}

/// Deterministic cache parameters: leaf 4 (Intel), 0x8000001d (AMD).
void detect_caches_cpuid(CpuInfo& info) {
  for (unsigned leaf : {4u, 0x8000001du}) {
    bool found = false;
    for (unsigned sub = 0; sub < 8; ++sub) {
      const Regs r = cpuid(leaf, sub);
      const unsigned type = r.a & 31, level = r.a >> 5 & 7;
      if (type == 0) break;
      const std::size_t ways = (r.b >> 22) + 1, partitions = (r.b >> 12 & 1023) + 1, line = (r.b & 4095) + 1;
      const std::size_t bytes = ways * partitions * line * (static_cast<std::size_t>(r.c) + 1);
      if (level == 1 && type == 1) info.l1d = bytes, found = true;
      if (level == 2 && type != 2) info.l2 = bytes;
      if (level == 3 && type != 2) info.l3 = bytes;
    }
    if (found) return;
  }
}

#elif defined(__aarch64__)

void detect_isa(CpuInfo& info) {
  info.neon = true;
  info.features.emplace_back("neon");
#if defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  info.neon_fp16 = has("hw.optional.arm.FEAT_FP16");
  add(info, info.neon_fp16, "fp16");
  add(info, has("hw.optional.arm.FEAT_DotProd"), "dotprod");
  add(info, has("hw.optional.arm.FEAT_I8MM"), "i8mm");
  const bool bf16 = has("hw.optional.arm.FEAT_BF16");
#else
  // bit numbers of the Linux ABI: older headers lack some of the names
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  const auto bit = [](unsigned long word, int i) { return (word >> i & 1ul) != 0; };
  info.neon_fp16 = bit(hwcap, 9) && bit(hwcap, 10);
  add(info, info.neon_fp16, "fp16");
  add(info, bit(hwcap, 20), "dotprod");
  add(info, bit(hwcap2, 13), "i8mm");
  const bool bf16 = bit(hwcap2, 14);
  add(info, bit(hwcap, 22), "sve");
#endif
  info.neon_bf16 = info.neon_fp16 && bf16;
  add(info, bf16, "bf16");
}

#else
void detect_isa(CpuInfo&) {}
#endif

#if defined(__APPLE__)

std::size_t sysctl_bytes(const char* name) {
  std::int64_t value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value > 0 ? static_cast<std::size_t>(value) : 0;
}

void detect_platform(CpuInfo& info) {
  char brand[128] = {};
  std::size_t size = sizeof brand - 1;
  if (sysctlbyname("machdep.cpu.brand_string", brand, &size, nullptr, 0) == 0) info.model = brand;
  const auto first = [](const char* performance, const char* any) {
    const std::size_t bytes = sysctl_bytes(performance);
    return bytes != 0 ? bytes : sysctl_bytes(any);
  };
  if (const std::size_t bytes = first("hw.perflevel0.l1dcachesize", "hw.l1dcachesize")) info.l1d = bytes;
  if (const std::size_t bytes = first("hw.perflevel0.l2cachesize", "hw.l2cachesize")) {
    const std::size_t cores = sysctl_bytes("hw.perflevel0.cpusperl2");
    info.l2 = bytes / (cores > 0 ? cores : 1);
  }
  info.l3 = sysctl_bytes("hw.l3cachesize");
}

#else

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

#if !defined(__x86_64__)
/// Number of CPUs in a list such as "0-3,8".
std::size_t count_cpus(const std::string& list) {
  std::size_t count = 0;
  const char* p = list.c_str();
  while (*p != '\0') {
    char* end;
    const long lo = std::strtol(p, &end, 10);
    if (end == p) break;
    long hi = lo;
    if (*end == '-') hi = std::strtol(end + 1, &end, 10);
    if (hi >= lo) count += static_cast<std::size_t>(hi - lo + 1);
    p = *end == ',' ? end + 1 : end;
  }
  return count;
}
#endif

/// Reads /sys/devices/system/cpu/cpu0/cache; false when it is not there (containers, emulators).
bool detect_caches_sysfs(CpuInfo& info) {
  bool found = false;
  for (int i = 0; i < 8; ++i) {
    const std::string dir = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    const std::string size = first_line(dir + "size");
    if (size.empty()) continue;
    char* unit;
    std::size_t bytes = std::strtoul(size.c_str(), &unit, 10);
    if (*unit == 'K') bytes <<= 10;
    if (*unit == 'M') bytes <<= 20;
    const std::string level = first_line(dir + "level");
    if (bytes == 0 || first_line(dir + "type") == "Instruction") continue;
    if (level == "1") info.l1d = bytes;
    if (level == "2") {
      info.l2 = bytes;
#if !defined(__x86_64__)
      // clusters share it; on x86-64 only the hyperthreads of one core do
      const std::size_t cpus = count_cpus(first_line(dir + "shared_cpu_list"));
      info.l2 = bytes / (cpus > 0 ? cpus : 1);
#endif
    }
    if (level == "3") info.l3 = bytes;
    found = found || level == "1";
  }
  return found;
}

void detect_caches_sysconf(CpuInfo& info) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const auto read = [](int name, std::size_t& bytes) {
    const long value = sysconf(name);
    if (value > 0) bytes = static_cast<std::size_t>(value);
  };
  read(_SC_LEVEL1_DCACHE_SIZE, info.l1d);
  read(_SC_LEVEL2_CACHE_SIZE, info.l2);
  read(_SC_LEVEL3_CACHE_SIZE, info.l3);
#else
  (void)info;
#endif
}

void detect_platform(CpuInfo& info) {
#if defined(__x86_64__)
  detect_caches_cpuid(info);
#endif
  if (!detect_caches_sysfs(info)) detect_caches_sysconf(info);
  if (!info.model.empty()) return;
  std::string board = first_line("/proc/device-tree/model");
  std::string implementer, part;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const std::size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.rfind("model name", 0) == 0) info.model = line.substr(colon + 2);
    if (line.rfind("CPU implementer", 0) == 0) implementer = line.substr(colon + 2);
    if (line.rfind("CPU part", 0) == 0) part = line.substr(colon + 2);
  }
  while (!board.empty() && board.back() == '\0') board.pop_back();
  if (info.model.empty() && !implementer.empty()) info.model = "ARM " + implementer + "/" + part;
  if (!board.empty()) info.model += info.model.empty() ? board : " (" + board + ")";
  if (info.model.empty()) info.model = "unknown";
}

#endif

CpuInfo detect() {
  CpuInfo info;
  detect_isa(info);
  detect_platform(info);
  while (!info.model.empty() && info.model.back() == ' ') info.model.pop_back();
  // an emulator may report nonsense
  if (info.l1d < 4096 || info.l1d > (1u << 22)) info.l1d = 32 * 1024;
  if (info.l2 < 32768 || info.l2 < info.l1d) info.l2 = 512 * 1024;
  return info;
}

}  // namespace

const CpuInfo& cpu_info() {
  static const CpuInfo info = detect();
  return info;
}

}  // namespace mnv4

#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace mnv4 {

/// What this machine can run. A feature counts only if the operating system saves its registers.
struct CpuInfo {
  std::string model;                  // marketing name, or implementer and part number
  bool avx2 = false;                  // AVX2 and FMA
  bool avx512 = false;                // AVX-512 F, BW, DQ, VL (and AVX2, FMA)
  bool neon = false;                  // Advanced SIMD, fp32
  bool neon_fp16 = false;             // and fp16 arithmetic (ARMv8.2)
  bool neon_bf16 = false;             // and products of bf16 (ARMv8.6)
  std::vector<std::string> features;  // all that were recognised, for people to read
  std::size_t l1d = 32 * 1024;        // bytes
  std::size_t l2 = 512 * 1024;        // bytes that one core can count on: a share, where cores share it
  std::size_t l3 = 0;                 // bytes, 0: none or unknown
};

/// Detected once, on the first call. Thread-safe.
const CpuInfo& cpu_info();

}  // namespace mnv4

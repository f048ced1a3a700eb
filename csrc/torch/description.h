// A list of operations as text, as mnv4_ops.native_export writes it into exported files:
//
//     mnv4 1
//     Block c_in=3 c_mid=32 c_out=32 expand=1 expand_kernel=3 expand_stride=2 expand_act=1 stage=1,0,-1,1,2,3,4,-1,0
//
// The first line has the version of the format. Each further line is an operation: the fields of its description as
// whole numbers (an act is one of Act, flags are 0 or 1; what is not named keeps its default), and for each stage its
// number, the indices of weight, bias, bn_weight, bn_bias, bn_mean, bn_var and gamma in the list of tensors (-1:
// absent) and the index of its eps.
#pragma once

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/program.h"

namespace mnv4 {

[[noreturn]] inline void refuse(const std::string& what) {
  throw std::invalid_argument("mnv4::native_program: " + what);
}

/// Tensors of a stage in the order in which they are written.
inline constexpr int kStageTensors = 7;

struct StageSource {
  int stage = 0;
  std::array<int, kStageTensors> tensors{};  // indices, -1: absent
  int eps = 0;
  std::int64_t rows = 0, depth = 0;  // elements of the weight: rows * depth; of everything else: rows
  bool bare = false;                 // a norm, which has no weight
};

struct DescribedOp {
  std::unique_ptr<Block> block;
  std::unique_ptr<Head> head;
  std::unique_ptr<Mqa> mqa;
  std::vector<StageSource> stages;
  Op op() const {
    if (block != nullptr) return block.get();
    if (head != nullptr) return head.get();
    return mqa.get();
  }
};

/// std::invalid_argument that says what is wrong with the text, also where indices are not below `tensors` and `eps`.
std::vector<DescribedOp> described(std::string_view text, std::size_t tensors, std::size_t eps);

}  // namespace mnv4

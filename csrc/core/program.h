// Blocks, attention blocks (and at most one head, last) run back to back in one parallel region; blocked activations in
// between.
#pragma once

#include <variant>
#include <vector>

#include "core/block.h"
#include "core/head.h"
#include "core/mqa.h"

namespace mnv4 {

using Op = std::variant<const Block*, const Head*, const Mqa*>;

struct Shape {
  int n = 0, c = 0, h = 0, w = 0;  // h = w = 0: [n, c]
};

/// Two blocks in bands of rows, so that what lies between them stays in L2: for the large images behind the stem.
struct Pair {
  int band = 0;             // output rows of the second block; 0: not worth it
  std::size_t between = 0;  // floats of the rows between the blocks
  std::size_t scratch = 0;  // floats of one thread in all
};
Pair plan_pair(const Block& a, const Block& b, int h, int w);
void run_pair(const Pair& p, const Region& r, const Block& a, const Block& b, const Tensor& x, const Tensor& out,
              bool padded, int n, int h, int w);

/// Empty when each op accepts what the one before it gives.
std::string check(const std::vector<Op>& ops);
Shape output_shape(const std::vector<Op>& ops, int n, int h, int w);
/// Empty when all ops take the sizes that an input of h x w pixels gives them.
std::string refuses(const std::vector<Op>& ops, int h, int w);
int input_channels(const Op& op);

/// How a list runs on inputs of one size.
struct ProgramPlan {
  int n = 0, h = 0, w = 0, threads = 1;
  std::size_t prefix = 0;   // operations at the front that a thread runs image by image
  std::vector<Pair> pairs;  // of each operation with the one after it
  std::size_t scratch = 0;  // floats of each thread
  std::size_t between = 0;  // floats of the largest batch between operations
  std::size_t image = 0;    // floats of the largest image inside of the prefix
  /// Floats of caller-owned memory for the activations between operations.
  std::size_t workspace() const { return 2 * (between + image * threads); }
};
ProgramPlan plan_program(const std::vector<Op>& ops, int n, int h, int w, int threads);

/// Runs the list. `seconds`, when given, receives the time of each op (thread 0). out is canonical channels_last, or
/// [n, features] after a head. `arena` holds threads * scratch floats.
void run(const std::vector<Op>& ops, const ProgramPlan& plan, const KernelTable& kernels, const Tensor& x, float* out,
         float* workspace, float* arena, double* seconds = nullptr);

}  // namespace mnv4

// Blocks (and at most one head, last) run back to back in one parallel region; blocked activations in between.
#pragma once

#include <variant>
#include <vector>

#include "core/block.h"
#include "core/head.h"

namespace mnv4 {

using Op = std::variant<const Block*, const Head*>;

struct Shape {
  int n = 0, c = 0, h = 0, w = 0;  // h = w = 0: [n, c]
};

/// Empty when each op accepts what the one before it gives.
std::string check(const std::vector<Op>& ops);
Shape output_shape(const std::vector<Op>& ops, int n, int h, int w);

/// Floats of caller-owned memory for the activations between blocks.
std::size_t workspace_floats(const std::vector<Op>& ops, int n, int h, int w);
/// Floats of scratch of each thread.
std::size_t scratch_floats(const std::vector<Op>& ops, int h, int w, int threads);

/// Runs the list. out is canonical channels_last, or [n, features] after a head. `arena` holds threads * scratch floats.
void run(const std::vector<Op>& ops, const KernelTable& kernels, const Tensor& x, int n, int h, int w, float* out, float* workspace,
         float* arena, std::size_t scratch, int threads);

}  // namespace mnv4

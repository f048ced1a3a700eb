// Blocks, attention blocks (and at most one head, last) run back to back in one parallel region; blocked activations in
// between.
#pragma once

#include <variant>
#include <vector>

#include "core/block.h"
#include "core/head.h"
#include "core/mqa.h"

namespace mnv4 {

/// What is run on elements T.
template <class T>
using BasicOp = std::variant<const BasicBlock<T>*, const BasicHead<T>*, const BasicMqa<T>*>;
template <class T>
using BasicOps = std::vector<BasicOp<T>>;
using Op = BasicOp<float>;

struct Shape {
  int n = 0, c = 0, h = 0, w = 0;  // h = w = 0: [n, c]
};

/// Two blocks in bands of rows, so that what lies between them stays in L2: for the large images behind the stem.
struct Pair {
  int band = 0;             // output rows of the second block; 0: not worth it
  std::size_t between = 0;  // elements of the rows between the blocks
  std::size_t scratch = 0;  // elements of one thread in all
};
template <class T>
Pair plan_pair(const BasicBlock<T>& a, const BasicBlock<T>& b, int h, int w);
template <class T>
void run_pair(const Pair& p, const BasicRegion<T>& r, const BasicBlock<T>& a, const BasicBlock<T>& b,
              const BasicTensor<T>& x, const BasicTensor<T>& out, bool padded, int n, int h, int w);

/// Empty when each op accepts what the one before it gives.
template <class T>
std::string check(const BasicOps<T>& ops);
template <class T>
Shape output_shape(const BasicOps<T>& ops, int n, int h, int w);
/// Empty when all ops take the sizes that an input of h x w pixels gives them.
template <class T>
std::string refuses(const BasicOps<T>& ops, int h, int w);
template <class T>
int input_channels(const BasicOp<T>& op);

/// How a list runs on inputs of one size.
struct ProgramPlan {
  int n = 0, h = 0, w = 0, threads = 1;
  std::size_t prefix = 0;   // operations at the front that a thread runs image by image
  std::vector<Pair> pairs;  // of each operation with the one after it
  std::size_t scratch = 0;  // elements of each thread
  std::size_t between = 0;  // elements of the largest batch between operations
  std::size_t image = 0;    // elements of the largest image inside of the prefix
  /// Elements of caller-owned memory for the activations between operations.
  std::size_t workspace() const { return 2 * (between + image * threads); }
};
template <class T>
ProgramPlan plan_program(const BasicOps<T>& ops, int n, int h, int w, int threads);

/// Runs the list. `seconds`, when given, receives the time of each op (thread 0). out is canonical channels_last, or
/// [n, features] after a head. `arena` holds threads * scratch elements.
template <class T>
void run(const BasicOps<T>& ops, const ProgramPlan& plan, const Kernels<T>& kernels, const BasicTensor<T>& x, T* out,
         T* workspace, T* arena, double* seconds = nullptr);

}  // namespace mnv4

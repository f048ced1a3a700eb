// A C++ program without Python that runs a MobileNetV4 exported by export.py, with the fused kernels:
//
//     python examples/cpp_host/export.py model.pt2
//     sh examples/cpp_host/build.sh host
//     ./host model.pt2 "$(python -c 'import mnv4_ops; print(mnv4_ops.native_library())')"
//
// Prints the logits of one image whose pixels go evenly from -1 to 1, and on stderr the median time of a forward.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::fprintf(stderr, "usage: %s model.pt2 libmnv4_ops_torch.so [size [threads]]\n", argv[0]);
    return 2;
  }
  const int size = argc > 3 ? std::stoi(argv[3]) : 224;
  at::set_num_threads(argc > 4 ? std::stoi(argv[4]) : 1);
  // registers the op, which has to be there when the package is opened
  if (dlopen(argv[2], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor x = at::linspace(-1, 1, 3 * size * size).reshape({1, 3, size, size});
  const at::Tensor logits = model.run({x})[0].contiguous();
  for (int64_t i = 0; i < logits.numel(); ++i) std::printf("%.9g\n", logits.data_ptr<float>()[i]);

  std::vector<double> times;
  for (int i = 0; i < 50; ++i) {
    const auto start = std::chrono::steady_clock::now();
    model.run({x});
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 25, times.end());
  std::fprintf(stderr, "%.3f ms a forward\n", times[25]);
}

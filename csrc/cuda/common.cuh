// What every CUDA op needs: device, stream, launch check, allocation, vector loads.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ssod {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor current and knows its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Raises if the last launch was refused.
inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Uninitialised contiguous tensor on the device of `like`.
inline Tensor new_cuda_output(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The first `count` sizes of a tensor.
inline std::vector<int64_t> first_sizes(const Tensor& t, int64_t count) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.begin() + count};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a loop that strides over the whole grid, capped so that the grid never overflows.
inline unsigned grid_blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, per_block), 1, int64_t{1} << 20));
}

}  // namespace ssod

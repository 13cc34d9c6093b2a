// Allocation of results.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace ssod {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Large fresh memory costs a page fault per 4 KiB, several times what the kernels need to fill it. Huge pages cut that
// by two orders.
inline void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kLarge = int64_t{4} << 20;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kLarge) {
    return;
  }
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal costs time alone
  }
#else
  (void)data, (void)bytes;
#endif
}

// Uninitialised contiguous CPU tensor. The allocator is called directly: torch::stable::new_empty looks aten::new_empty
// up by name each time, which takes longer than a small kernel.
inline Tensor new_output(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = count;
    count *= sizes[d] > 1 ? sizes[d] : 1;
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  advise_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

// The first `count` sizes of a tensor.
inline std::vector<int64_t> leading_sizes(const Tensor& t, int64_t count) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.begin() + count};
}

}  // namespace ssod

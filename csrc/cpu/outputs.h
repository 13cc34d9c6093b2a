// Allocation of results.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
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
#endif
}

// Uninitialised contiguous tensor on the device of `like`.
inline Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, sizes, dtype);
  int64_t bytes = static_cast<int64_t>(out.element_size());
  for (const int64_t size : sizes) {
    bytes *= size;
  }
  advise_huge_pages(out.data_ptr(), bytes);
  return out;
}

inline Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_output(like, sizes, like.scalar_type());
}

// The first `count` sizes of a tensor.
inline std::vector<int64_t> leading_sizes(const Tensor& t, int64_t count) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.begin() + count};
}

}  // namespace ssod

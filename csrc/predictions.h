// Where the predictions and the target rows of a layer and an image lie, on the CPU and on the GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>

#include "boxes.h"
#include "row_ranges.h"

namespace ssod {

// A tensor [L, B, Q, K] with contiguous last dimension.
struct PredictionView {
  const void* data;
  torch::headeronly::ScalarType dtype;
  int64_t layer, image, query;  // strides in elements
  int64_t width;                // K

  SSOD_HD int64_t offset(int64_t l, int64_t b, int64_t q) const { return l * layer + b * image + q * query; }

  // One element, whatever its type.
  template <typename T>
  SSOD_HD T load(int64_t i) const {
    using torch::headeronly::ScalarType;
    switch (dtype) {
      case ScalarType::Half:
        return static_cast<T>(static_cast<float>(static_cast<const c10::Half*>(data)[i]));
      case ScalarType::BFloat16:
        return static_cast<T>(static_cast<float>(static_cast<const c10::BFloat16*>(data)[i]));
      case ScalarType::Double:
        return static_cast<T>(static_cast<const double*>(data)[i]);
      default:
        return static_cast<T>(static_cast<const float*>(data)[i]);
    }
  }
};

inline PredictionView make_prediction_view(const torch::stable::Tensor& t) {
  return {t.data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), t.stride(2), t.size(3)};
}

inline RowRanges make_row_ranges(const std::optional<torch::stable::Tensor>& offsets,
                                 const std::optional<torch::stable::Tensor>& counts, int64_t batch, int64_t rows) {
  const auto data = [](const std::optional<torch::stable::Tensor>& t) {
    return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
  };
  return {data(offsets), data(counts), rows, batch};
}

}  // namespace ssod

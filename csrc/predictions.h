// Where the predictions and the target rows of a layer and an image lie, on the CPU and on the GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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
};

inline PredictionView make_prediction_view(const torch::stable::Tensor& t) {
  return {t.data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), t.stride(2), t.size(3)};
}

// Rows before those of the first image, and rows behind those of an image up to the next: every row that belongs to no
// image lies in exactly one of these ranges.
SSOD_HD RowRange gap_before(const RowRanges& ranges, int64_t image) { return {0, image == 0 ? ranges.of(0).begin : 0}; }

SSOD_HD RowRange gap_behind(const RowRanges& ranges, int64_t image) {
  const RowRange own = ranges.of(image);
  const int64_t begin = own.begin + own.size;
  if (ranges.offsets) {
    return {begin, image + 1 < ranges.batch ? 0 : ranges.rows - begin};
  }
  return {begin, (image + 1) * (ranges.rows / ranges.batch) - begin};
}

inline RowRanges make_row_ranges(const std::optional<torch::stable::Tensor>& offsets,
                                 const std::optional<torch::stable::Tensor>& counts, int64_t batch, int64_t rows) {
  const auto data = [](const std::optional<torch::stable::Tensor>& t) {
    return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
  };
  return {data(offsets), data(counts), rows, batch};
}

}  // namespace ssod

// Tensors of one_to_many_assign as its kernels read them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "assign_options.h"
#include "one_to_many_team.h"

namespace ssod {

template <typename T>
const T* pointer_or_null(const std::optional<torch::stable::Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

inline AssignInput make_assign_input(const std::optional<torch::stable::Tensor>& scores,
                                     const torch::stable::Tensor& boxes, const torch::stable::Tensor& labels,
                                     const torch::stable::Tensor& target_boxes,
                                     const std::optional<torch::stable::Tensor>& offsets,
                                     const std::optional<torch::stable::Tensor>& counts,
                                     const std::optional<torch::stable::Tensor>& priors,
                                     const std::optional<torch::stable::Tensor>& image_hw, int64_t batch,
                                     const AssignOptions& options) {
  AssignInput in{};
  in.scores = pointer_or_null<float>(scores);
  in.boxes = static_cast<const float*>(boxes.data_ptr());
  for (int d = 0; d < 4; ++d) {
    in.score_strides[d] = scores ? scores->stride(d) : 0;
  }
  for (int d = 0; d < 3; ++d) {
    in.box_strides[d] = boxes.stride(d);
  }
  in.layers = boxes.size(0);
  in.queries = boxes.size(2);
  in.classes = scores ? scores->size(3) : 0;
  in.labels = static_cast<const int64_t*>(labels.data_ptr());
  in.target_boxes = static_cast<const float*>(target_boxes.data_ptr());
  in.rows = {pointer_or_null<int64_t>(offsets), pointer_or_null<int64_t>(counts), labels.size(0), batch};
  in.priors = pointer_or_null<float>(priors);
  in.prior_width = priors ? priors->size(1) : 0;
  in.image_hw = pointer_or_null<float>(image_hw);
  in.options = options;
  return in;
}

}  // namespace ssod

// Several queries for each target, in parallel over layers and images.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>

#include "assign_input.h"
#include "cpu/assign_image.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

template <AssignRule rule>
void assign_images(const AssignInput& in, const AssignOutput& out) {
  const PriorPlanes priors(in.priors, in.prior_width, in.queries);
  const int64_t targets = in.rows.rows / std::max<int64_t>(1, in.rows.batch);
  parallel_rows(in.layers * in.rows.batch, in.queries * (targets + 4), [&](int64_t begin, int64_t end) {
    ImageAssigner<rule> assigner(in, priors, out);
    for (int64_t i = begin; i < end; ++i) {
      assigner.run(i / in.rows.batch, i % in.rows.batch);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> one_to_many_assign(
    std::optional<Tensor> scores, Tensor boxes, Tensor labels, Tensor target_boxes, std::optional<Tensor> offsets,
    std::optional<Tensor> counts, std::optional<Tensor> priors, std::optional<Tensor> image_hw,
    std::vector<int64_t> levels, int64_t batch, int64_t rule, bool from_logits, int64_t fmt, int64_t topk,
    int64_t final_topk, double alpha, double beta, double eps, double min_side, bool dynamic_k, int64_t conflict,
    bool keep_one) {
  const auto lead = leading_sizes(boxes, 3);
  Tensor target = new_output(lead, ScalarType::Long), count = new_output({lead[0], labels.size(0)}, ScalarType::Int);
  Tensor metric = new_output(lead, ScalarType::Float), iou = new_output(lead, ScalarType::Float),
         weight = new_output(lead, ScalarType::Float);
  std::memset(count.data_ptr(), 0, count.numel() * sizeof(int32_t));
  const AssignOptions options = make_assign_options(levels, lead[2], rule, from_logits, fmt, topk, final_topk, alpha,
                                                    beta, eps, min_side, dynamic_k, conflict, keep_one);
  const AssignInput in =
      make_assign_input(scores, boxes, labels, target_boxes, offsets, counts, priors, image_hw, batch, options);
  const AssignOutput out{static_cast<int64_t*>(target.data_ptr()), static_cast<float*>(metric.data_ptr()),
                         static_cast<float*>(iou.data_ptr()), static_cast<float*>(weight.data_ptr()),
                         static_cast<int32_t*>(count.data_ptr())};
  if (target.numel() > 0) {
    with_assign_rule(options.rule, [&](auto constant) { assign_images<constant()>(in, out); });
  }
  return {target, metric, iou, weight, count};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("one_to_many_assign", TORCH_BOX(&one_to_many_assign)); }

}  // namespace
}  // namespace ssod

// Arguments of one_to_many_assign as options of its kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "one_to_many.h"

namespace ssod {

inline AssignOptions make_assign_options(const std::vector<int64_t>& levels, int64_t queries, int64_t rule,
                                         bool from_logits, int64_t fmt, int64_t topk, int64_t final_topk, double alpha,
                                         double beta, double eps, double min_side, bool dynamic_k, int64_t conflict,
                                         bool keep_one) {
  const auto few = [](int64_t k) { return static_cast<int>(k < INT32_MAX ? k : INT32_MAX); };
  AssignOptions o{};
  o.rule = static_cast<AssignRule>(rule);
  o.format = static_cast<Format>(fmt);
  o.alpha = make_exponent(alpha);
  o.beta = make_exponent(beta);
  o.eps = static_cast<float>(eps);
  o.min_side = static_cast<float>(min_side);
  o.topk = few(topk < queries ? topk : queries);
  o.final_topk = few(final_topk);
  for (const int64_t size : levels) {
    o.level_end[o.level_count] = (o.level_count ? o.level_end[o.level_count - 1] : 0) + size;
    ++o.level_count;
  }
  if (o.level_count == 0) {
    o.level_end[0] = queries;
    o.level_count = 1;
  }
  o.from_logits = from_logits;
  o.dynamic_k = dynamic_k;
  o.by_metric = conflict & 1;
  o.any_target = conflict & 2;
  o.keep_one = keep_one;
  return o;
}

}  // namespace ssod

// Pairs of one layer, by image and query.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/outputs.h"
#include "predictions.h"

namespace ssod {
namespace {

using Pair = std::pair<int64_t, int64_t>;  // query and its target

// Pairs of one image, queries ascending.
void collect(const int64_t* query, int64_t entries, int64_t rows, const RowRange& range, std::vector<Pair>& pairs) {
  pairs.clear();
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t* of_entry = query + e * rows + range.begin;
    for (int64_t t = 0; t < range.size; ++t) {
      if (of_entry[t] >= 0) {
        pairs.emplace_back(of_entry[t], t);
      }
    }
  }
  std::sort(pairs.begin(), pairs.end());
}

std::tuple<Tensor, Tensor, Tensor> matched_pairs(Tensor query, std::optional<Tensor> offsets,
                                                 std::optional<Tensor> counts, int64_t batch, int64_t) {
  const int64_t entries = query.size(0), rows = query.size(1);
  Tensor queries = new_output({entries * rows}, ScalarType::Long),
         targets = new_output({entries * rows}, ScalarType::Long);
  Tensor count = new_output({batch}, ScalarType::Long);
  auto* out_query = static_cast<int64_t*>(queries.data_ptr());
  auto* out_target = static_cast<int64_t*>(targets.data_ptr());
  const RowRanges images = make_row_ranges(offsets, counts, batch, rows);
  std::vector<Pair> pairs;
  int64_t done = 0;
  for (int64_t b = 0; b < batch; ++b) {
    collect(static_cast<const int64_t*>(query.data_ptr()), entries, rows, images.of(b), pairs);
    for (const auto& [q, t] : pairs) {
      out_query[done] = q;
      out_target[done++] = t;
    }
    static_cast<int64_t*>(count.data_ptr())[b] = static_cast<int64_t>(pairs.size());
  }
  std::fill(out_query + done, out_query + entries * rows, -1);
  std::fill(out_target + done, out_target + entries * rows, -1);
  return {queries, targets, count};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("matched_pairs", TORCH_BOX(&matched_pairs)); }

}  // namespace
}  // namespace ssod

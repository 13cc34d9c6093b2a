// Runs the team form of one-to-many assignment (csrc/one_to_many_team.h) on threads of the CPU: the steps of the CUDA
// op, a team in the place of a block. Not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <vector>

#include "assign_options.h"
#include "one_to_many_team.h"
#include "thread_team.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Longs = py::array_t<int64_t, py::array::c_style>;

struct AtomicClaim {
  unsigned long long* winner;
  uint32_t* claims;  // or null
  const ssod::AssignOptions* options;
  int64_t row;

  void operator()(int64_t q, const ssod::PairValue& v) const {
    const auto mine = ssod::pack_claim(ssod::contest_of(v, *options), row);
    std::atomic_ref<unsigned long long> best(winner[q]);
    for (auto seen = best.load(); seen < mine && !best.compare_exchange_weak(seen, mine);) {
    }
    if (claims) {
      std::atomic_ref<uint32_t>(claims[q]).fetch_add(1);
    }
  }
};

struct Memory {
  std::vector<int64_t> target;
  std::vector<float> metric, iou, weight, background;
  std::vector<int32_t> count;
  std::vector<unsigned long long> winner;
  std::vector<uint32_t> claims, most_metric, most_iou;

  Memory(int64_t queries, int64_t targets)
      : target(queries),
        metric(queries),
        iou(queries),
        weight(queries),
        background(queries),
        count(targets),
        winner(queries),
        claims(queries),
        most_metric(targets),
        most_iou(targets) {}

  ssod::AssignState state(bool any_target, bool costs) {
    return {target.data(),
            metric.data(),
            iou.data(),
            weight.data(),
            count.data(),
            winner.data(),
            any_target ? claims.data() : nullptr,
            costs ? background.data() : nullptr,
            most_metric.data(),
            most_iou.data()};
  }
};

template <ssod::AssignRule rule>
void fill_background(const ssod::AssignInput& in, int64_t layer, int64_t image, float* background) {
  const ssod::QueryView view = in.view(layer, image);
  const ssod::RowRange range = in.rows.of(image);
  for (int64_t q = 0; q < in.queries; ++q) {
    bool admitted = false;
    for (int64_t row = range.begin; row < range.begin + range.size; ++row) {
      admitted = admitted || (in.usable(row) && ssod::admits<rule>(in.target(row), ssod::load_prior(view, q)));
    }
    float sum = 0.0f;
    for (int64_t c = 0; c < in.classes; ++c) {
      sum += ssod::class_background<rule>(view.score(q, c), in.options.from_logits);
    }
    background[q] = admitted ? sum : ssod::no_background();
  }
}

template <ssod::AssignRule rule>
void assign_image(const ssod::AssignInput& in, const ssod::AssignState& state, int64_t layer, int64_t image, int size) {
  const int64_t first = (layer * in.rows.batch + image) * in.queries;
  const ssod::RowRange range = in.rows.of(image);
  std::vector<float> merits(in.queries);
  std::vector<int32_t> chosen(ssod::chosen_capacity(in.options, in.queries));
  ssod::run_team(size, [&](ssod::ThreadTeam& team) {
    for (int64_t row = range.begin; row < range.begin + range.size; ++row) {
      const AtomicClaim claim{state.winner + first, state.claims ? state.claims + first : nullptr, &in.options, row};
      ssod::claim_queries<rule>(team, in, state, layer, image, row, {merits.data(), chosen.data()}, claim);
      team.sync();
    }
  });
  for (int64_t q = 0; q < in.queries; ++q) {
    const int64_t row = ssod::settle_query<rule>(in, state, layer, image, q), i = first + q;
    if (row >= 0 && in.options.final_topk == 0) {
      const int64_t t = layer * in.rows.rows + row;
      ++state.count[t];
      state.most_metric[t] = std::max(state.most_metric[t], ssod::bits_as<uint32_t>(ssod::positive(state.metric[i])));
      state.most_iou[t] = std::max(state.most_iou[t], ssod::bits_as<uint32_t>(state.iou[i]));
    }
  }
  ssod::run_team(size, [&](ssod::ThreadTeam& team) {
    for (int64_t row = range.begin; in.options.final_topk > 0 && row < range.begin + range.size; ++row) {
      ssod::trim_target<rule>(team, in, state, layer, image, row, merits.data());
      team.sync();
    }
    if (in.options.keep_one) {
      ssod::rescue_targets<rule>(team, in, state, layer, image);
    }
  });
  for (int64_t q = 0; q < in.queries; ++q) {
    ssod::weigh_query<rule>(in, state, layer, first + q);
  }
}

const float* data_or_null(const std::optional<Floats>& t) { return t ? t->data() : nullptr; }
const int64_t* data_or_null(const std::optional<Longs>& t) { return t ? t->data() : nullptr; }

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The op with its outputs flattened; everything contiguous.
py::tuple assign(std::optional<Floats> scores, Floats boxes, Longs labels, Floats target_boxes,
                 std::optional<Longs> offsets, std::optional<Longs> counts, std::optional<Floats> priors,
                 std::optional<Floats> image_hw, std::vector<int64_t> levels, int64_t batch, int64_t rule,
                 bool from_logits, int64_t fmt, int64_t topk, int64_t final_topk, double alpha, double beta, double eps,
                 double min_side, bool dynamic_k, int64_t conflict, bool keep_one, int team) {
  ssod::AssignInput in{};
  in.layers = boxes.shape(0);
  in.queries = boxes.shape(2);
  in.classes = scores ? scores->shape(3) : 0;
  in.scores = data_or_null(scores);
  in.boxes = boxes.data();
  const int64_t queries = in.queries, classes = in.classes;
  const int64_t score_strides[] = {batch * queries * classes, queries * classes, classes, 1};
  const int64_t box_strides[] = {batch * queries * 4, queries * 4, 4};
  for (int d = 0; d < 4; ++d) {
    in.score_strides[d] = score_strides[d];
  }
  for (int d = 0; d < 3; ++d) {
    in.box_strides[d] = box_strides[d];
  }
  in.labels = labels.data();
  in.target_boxes = target_boxes.data();
  in.rows = {data_or_null(offsets), data_or_null(counts), labels.shape(0), batch};
  in.priors = data_or_null(priors);
  in.prior_width = priors ? priors->shape(1) : 0;
  in.image_hw = data_or_null(image_hw);
  in.options = ssod::make_assign_options(levels, queries, rule, from_logits, fmt, topk, final_topk, alpha, beta, eps,
                                         min_side, dynamic_k, conflict, keep_one);
  Memory memory(in.layers * batch * queries, in.layers * in.rows.rows);
  ssod::with_assign_rule(in.options.rule, [&](auto constant) {
    const ssod::AssignState state = memory.state(in.options.any_target, ssod::is_cost(constant()));
    for (int64_t layer = 0; layer < in.layers; ++layer) {
      for (int64_t image = 0; image < batch; ++image) {
        if constexpr (ssod::is_cost(constant())) {
          fill_background<constant()>(in, layer, image, memory.background.data() + (layer * batch + image) * queries);
        }
        assign_image<constant()>(in, state, layer, image, team);
      }
    }
  });
  return py::make_tuple(to_array(memory.target), to_array(memory.metric), to_array(memory.iou), to_array(memory.weight),
                        to_array(memory.count));
}

}  // namespace

PYBIND11_MODULE(one_to_many, m) { m.def("assign", &assign); }

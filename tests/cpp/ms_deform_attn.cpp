// Runs csrc/ms_deform_attn_rows*.h with threads of the CPU as the lanes of a warp run it, and exposes the order of
// rows. Not part of the package.
#include "ms_deform_attn_host.h"
#include "ms_deform_attn_ordered.h"
#include "ms_deform_attn_rows_backward.h"
#include "ms_deform_attn_schedule.h"

namespace {

// Calls work(group, place, levels) for every row of the schedule, in its order.
template <typename X, int lanes, typename F>
void each_row(const Arguments<X>& arguments, F&& work) {
  const ssod::LevelSource source = arguments.source();
  std::vector<ssod::SampledLevel<X>> levels(source.count);
  const auto schedule =
      ssod::make_row_schedule(arguments.size(0), arguments.queries(), arguments.size(2), arguments.size(1), 3);
  ThreadGroup::Slots slots(lanes);
  ssod::run_team(lanes, [&](ssod::ThreadTeam& team) {
    ssod::fill_levels(team, source, arguments.offset_scale, levels.data());
    ThreadGroup group(team, slots);
    for (int64_t block = 0; block < schedule.blocks(); ++block) {
      const auto rows = ssod::block_rows(schedule, static_cast<uint32_t>(block), levels.data(), source.count);
      for (int32_t position = 0; position < schedule.per_block; ++position) {
        group.move(position % (32 / lanes));
        work(group, ssod::scheduled_row(schedule, rows, position, levels.data()), levels.data());
      }
    }
  });
}

template <typename Traits>
py::tuple forward(const Arguments<typename Traits::T>& arguments) {
  using T = typename Traits::T;
  const int64_t rows[] = {arguments.size(0), arguments.queries(), arguments.size(2)};
  Array<T> out({rows[0], rows[1], rows[2] * arguments.size(3)}), lse({rows[0], rows[1], rows[2]});
  std::fill_n(out.mutable_data(), out.size(), static_cast<T>(NAN));
  ssod::BoardOf<Traits> board;
  const auto in = arguments.samples();
  const auto value = arguments.tokens();
  T *out_data = out.mutable_data(), *lse_data = lse.mutable_data();
  each_row<T, Traits::kLanes>(arguments, [&](ThreadGroup& group, const ssod::SampleRow& place, const auto* levels) {
    if (arguments.reference) {
      ssod::attend_row<true, Traits>(group, in, levels, value, place, board, out_data, lse_data);
    } else {
      ssod::attend_row<false, Traits>(group, in, levels, value, place, board, out_data, lse_data);
    }
  });
  return py::make_tuple(out, lse);
}

template <typename Traits>
py::tuple backward(const Arguments<typename Traits::T>& arguments, const Array<typename Traits::T>& grad,
                   const Array<typename Traits::T>& lse) {
  using T = typename Traits::T;
  const auto samples = arguments.samples();
  const int64_t references = samples.reference ? samples.reference_levels * samples.reference_size : 0;
  const int64_t lead[] = {arguments.size(0), arguments.queries(), arguments.size(2), arguments.weights.shape(3)};
  Array<T> grad_value(std::vector<int64_t>(arguments.value.shape(), arguments.value.shape() + 4));
  Array<T> grad_reference({lead[0], lead[1], lead[2], references}), grad_weights({lead[0], lead[1], lead[2], lead[3]});
  Array<T> grad_positions({lead[0], lead[1], lead[2], lead[3], int64_t{2}});
  std::fill_n(grad_value.mutable_data(), grad_value.size(), T(0));
  for (Array<T>* each : {&grad_reference, &grad_weights, &grad_positions}) {
    std::fill_n(each->mutable_data(), each->size(), static_cast<T>(NAN));
  }
  const ssod::BackwardInput<Traits> in{samples,
                                       arguments.tokens(),
                                       grad.data(),
                                       lse.data(),
                                       {grad_value.mutable_data(),
                                        arguments.size(1) * arguments.size(2) * arguments.size(3),
                                        references ? grad_reference.mutable_data() : nullptr,
                                        {grad_positions.mutable_data()},
                                        {grad_weights.mutable_data()}}};
  ssod::BoardOf<Traits> board;
  std::vector<T> products(lead[3]);
  each_row<T, Traits::kLanes>(arguments, [&](ThreadGroup& group, const ssod::SampleRow& place, const auto* levels) {
    if (arguments.reference) {
      ssod::attend_row_backward<true, Traits>(group, in, levels, place, board, products.data());
    } else {
      ssod::attend_row_backward<false, Traits>(group, in, levels, place, board, products.data());
    }
  });
  return py::make_tuple(grad_value, grad_reference, grad_positions, grad_weights);
}

// The gradient of value by owners of `run` tokens, `parts` parts of the samples after each other.
template <typename Traits>
Array<typename Traits::T> ordered(const Arguments<typename Traits::T>& arguments, const Array<typename Traits::T>& grad,
                                  const Array<typename Traits::T>& lse, int32_t run, int parts) {
  using T = typename Traits::T;
  const int64_t images = arguments.size(0), heads = arguments.size(2);
  const auto tokens = static_cast<int32_t>(arguments.size(1)), channels = static_cast<int32_t>(arguments.size(3));
  Array<T> out(std::vector<int64_t>(arguments.value.shape(), arguments.value.shape() + 4));
  T* data = out.mutable_data();
  std::fill_n(data, out.size(), static_cast<T>(NAN));
  const ssod::OrderedInput<Traits> in{arguments.samples(), arguments.queries(), tokens, channels,
                                      grad.data(),         lse.data()};
  const ssod::LevelSource source = arguments.source();
  std::vector<ssod::SampledLevel<T>> levels(source.count);
  ssod::BoardOf<Traits> board;
  ThreadGroup::Slots slots(Traits::kLanes);
  std::vector<T> sums(static_cast<size_t>(run) * Traits::kLanes);
  ssod::run_team(Traits::kLanes, [&](ssod::ThreadTeam& team) {
    ssod::fill_levels(team, source, arguments.offset_scale, levels.data());
    ThreadGroup group(team, slots);
    for (int64_t pair = 0; pair < images * heads; ++pair) {
      for (int32_t channel = 0; channel < channels; channel += Traits::kLanes) {
        for (int32_t first = 0; first < tokens; first += run) {
          const auto image = static_cast<int32_t>(pair / heads), head = static_cast<int32_t>(pair % heads);
          const ssod::OwnedTokens own{image, head, first, std::min(run, tokens - first), channel};
          for (int32_t t = 0; t < run; ++t) {
            sums[t * Traits::kLanes + group.rank()] = 0;
          }
          for (int part = 0; part < parts; ++part) {
            if (arguments.reference) {
              ssod::add_part_in_order<true>(group, in, levels.data(), own, part, parts, board, sums.data());
            } else {
              ssod::add_part_in_order<false>(group, in, levels.data(), own, part, parts, board, sums.data());
            }
          }
          for (int32_t t = 0; t < own.count && channel + group.rank() < channels; ++t) {
            const int64_t row = ((int64_t{image} * tokens + first + t) * heads + head) * channels;
            data[row + channel + group.rank()] = sums[t * Traits::kLanes + group.rank()];
          }
        }
      }
    }
  });
  return out;
}

// Position in row-major order of every place of the strip order of one level.
Array<int64_t> strip_order(int32_t height, int32_t width) {
  Array<int64_t> out(int64_t{height} * width);
  for (int32_t p = 0; p < height * width; ++p) {
    out.mutable_data()[p] = ssod::strip_token(p, height, width);
  }
  return out;
}

// Places on the board of the samples of every group of a warp, [group][sample], and the size of the board.
template <int lanes>
std::pair<std::vector<std::vector<int>>, int> slots() {
  using Board = ssod::SampleBoard<float, lanes>;
  std::vector<std::vector<int>> found(Board::kGroups, std::vector<int>(lanes));
  for (int group = 0; group < Board::kGroups; ++group) {
    for (int sample = 0; sample < lanes; ++sample) {
      found[group][sample] = Board::slot(group, sample);
    }
  }
  return {found, lanes * Board::kStride};
}

template <typename X, int lanes, int vector, bool exact>
void bind_rows(py::module_& m, const std::string& name) {
  m.def(("forward_" + name).c_str(), &forward<HostTraits<X, lanes, vector, exact>>);
  m.def(("backward_" + name).c_str(), &backward<HostTraits<X, lanes, vector, exact>>);
}

}  // namespace

PYBIND11_MODULE(ms_deform_attn, m) {
  m.def("ordered_f32", &ordered<HostTraits<float, 4, 1, false>>);
  m.def("ordered_f64", &ordered<HostTraits<double, 4, 1, false>>);
  m.def("strip_order", &strip_order);
  m.def("slots_2", &slots<2>);
  m.def("slots_4", &slots<4>);
  m.def("slots_8", &slots<8>);
  m.def("slots_16", &slots<16>);
  m.def("slots_32", &slots<32>);
  bind<float>(m, "Arguments32");
  bind<double>(m, "Arguments64");
  bind_rows<float, 2, 4, true>(m, "f32_2x4");
  bind_rows<float, 4, 2, true>(m, "f32_4x2");
  bind_rows<float, 8, 4, true>(m, "f32_8x4");
  bind_rows<float, 2, 4, false>(m, "f32_2x4_slabs");
  bind_rows<float, 4, 1, false>(m, "f32_4x1_slabs");
  bind_rows<double, 4, 1, false>(m, "f64_4x1_slabs");
}

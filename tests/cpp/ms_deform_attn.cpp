// Runs csrc/ms_deform_attn_rows*.h with threads of the CPU as the lanes of a warp run it, and exposes the order of
// rows. Not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "ms_deform_attn_ordered.h"
#include "ms_deform_attn_rows_backward.h"
#include "ms_deform_attn_schedule.h"
#include "thread_team.h"

namespace {

namespace py = pybind11;
template <typename X>
using Array = py::array_t<X, py::array::c_style | py::array::forcecast>;

template <typename X>
struct PlainFloats {
  X* data;

  template <typename T>
  T load(int64_t i) const {
    return data[i];
  }
  void load_pair(int64_t i, X& x, X& y) const {
    x = data[i];
    y = data[i + 1];
  }
  PlainFloats from(int64_t i) const { return {data + i}; }
  void store(int64_t i, X x) const { data[i] = x; }
  void store_pair(int64_t i, X x, X y) const {
    data[i] = x;
    data[i + 1] = y;
  }
};

struct HostMemory {
  template <int kVector, typename T>
  static void load_if(bool wanted, const T* from, T* to) {
    for (int i = 0; i < kVector; ++i) {
      to[i] = wanted ? from[i] : T(0);
    }
  }
  template <int kVector, typename T>
  static void store(T* to, const T* from) {
    std::copy_n(from, kVector, to);
  }
  template <int kVector, typename T>
  static void add(T* to, const T* from) {
    for (int i = 0; i < kVector; ++i) {
      std::atomic_ref<T>(to[i]).fetch_add(from[i]);
    }
  }
};

template <typename X, int lanes, int vector, bool exact>
struct HostTraits {
  using T = X;
  using V = X;
  static constexpr int kLanes = lanes, kVector = vector;
  static constexpr bool kExact = exact;
  using Floats = PlainFloats<X>;
  using Memory = HostMemory;
};

// A group of lanes of a warp; `index` changes from row to row, so that every place of a board is used.
class ThreadGroup {
 public:
  using Slots = std::vector<std::array<unsigned char, 16>>;

  ThreadGroup(ssod::ThreadTeam& team, Slots& slots) : team_(team), slots_(slots) {}
  int rank() const { return team_.rank(); }
  int index() const { return index_; }
  void move(int index) { index_ = index; }
  void sync() { team_.sync(); }
  template <typename T>
  T swap(T value, int distance) {
    std::memcpy(&slots_[rank()], &value, sizeof(T));
    sync();
    T other;
    std::memcpy(&other, &slots_[rank() ^ distance], sizeof(T));
    sync();
    return other;
  }
  uint32_t ballot(bool vote) {
    slots_[rank()][0] = vote;
    sync();
    uint32_t votes = 0;
    for (int lane = 0; lane < team_.size(); ++lane) {
      votes |= uint32_t{slots_[lane][0]} << lane;
    }
    sync();
    return votes;
  }

 private:
  ssod::ThreadTeam& team_;
  Slots& slots_;
  int index_ = 0;
};

template <typename X>
struct Arguments {
  Array<X> value;  // [B, S, M, C]
  std::vector<int64_t> shapes;
  std::optional<Array<int64_t>> starts;
  bool on_device;  // sizes come as those that only the device knows
  std::vector<int32_t> points;
  std::optional<Array<X>> reference;
  Array<X> positions, weights;
  int64_t method;
  double offset_scale;

  int64_t size(int d) const { return value.shape(d); }
  int64_t queries() const { return weights.shape(1); }

  ssod::LevelSource source() const {
    ssod::LevelSource source{};
    source.shapes = on_device ? shapes.data() : nullptr;
    source.starts = starts ? starts->data() : nullptr;
    for (size_t i = 0; !on_device && i < shapes.size(); ++i) {
      source.sizes[i] = static_cast<int32_t>(shapes[i]);
    }
    std::copy(points.begin(), points.end(), source.points);
    source.count = static_cast<int32_t>(points.size());
    source.tokens = static_cast<int32_t>(size(1));
    return source;
  }

  ssod::SampleInput<X, PlainFloats<X>> samples() const {
    const int64_t heads = size(2), samples = weights.shape(3);
    const bool equal = std::equal(points.begin() + !points.empty(), points.end(), points.begin());
    const auto data = [](const Array<X>& a) { return PlainFloats<X>{const_cast<X*>(a.data())}; };
    ssod::SampleInput<X, PlainFloats<X>> in{data(positions), data(weights), heads * samples * 2, heads * samples};
    if (reference) {
      in.reference = reference->data();
      in.reference_levels = static_cast<int32_t>(reference->shape(2));
      in.reference_size = static_cast<int32_t>(reference->shape(3));
    }
    in.heads = static_cast<int32_t>(heads);
    in.samples = static_cast<int32_t>(samples);
    in.levels = static_cast<int32_t>(points.size());
    in.levels_per_sample = equal && samples > 0 ? 1.0f / static_cast<float>(points[0]) : 0.0f;
    in.method = static_cast<ssod::SampleMethod>(method);
    return in;
  }

  ssod::TokenRows<X> tokens() const {
    return {value.data(), size(1) * size(2) * size(3), static_cast<uint32_t>(size(2) * size(3) * sizeof(X)),
            static_cast<int32_t>(size(1)), static_cast<int32_t>(size(3))};
  }
};

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

template <typename X>
void bind(py::module_& m, const char* name) {
  py::class_<Arguments<X>>(m, name).def(
      py::init([](Array<X> value, std::vector<int64_t> shapes, std::optional<Array<int64_t>> starts, bool on_device,
                  std::vector<int32_t> points, std::optional<Array<X>> reference, Array<X> positions, Array<X> weights,
                  int64_t method, double offset_scale) {
        return Arguments<X>{value,     shapes,    starts,  on_device, points,
                            reference, positions, weights, method,    offset_scale};
      }));
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

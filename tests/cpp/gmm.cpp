// Runs csrc/gmm.h with a team of CPU threads, as a CUDA block runs it. Not part of the package.
#include "gmm.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "thread_team.h"

namespace {

namespace py = pybind11;
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
T* data(Array<T>& array) {
  return static_cast<T*>(array.mutable_data());
}

// Results in the order of the op, except that nothing is shared with torch: NumPy arrays in, NumPy arrays out.
template <typename T>
py::tuple gmm(int threads, const Array<T>& values, const std::optional<Array<int64_t>>& offsets,
              const std::optional<Array<int64_t>>& counts, int64_t batch, double reg_covar, double tol, int max_iter,
              bool reverse, int64_t rule) {
  constexpr int kHeld = 2;  // few, so that both the held and the remaining samples are met
  const ssod::RowRanges ranges{offsets ? offsets->data() : nullptr, counts ? counts->data() : nullptr, values.size(),
                               batch};
  const ssod::GmmOptions options{reg_covar, tol, max_iter, reverse, static_cast<ssod::GmmRule>(rule)};
  Array<T> threshold(batch);
  Array<bool> keep(values.size());
  Array<double> statistics(7 * batch);
  Array<int32_t> counters({int64_t{3}, batch});
  std::fill_n(data(keep), keep.size(), false);
  const ssod::GmmOutputs out{data(threshold), data(keep), data(statistics), data(counters), batch};
  const T* samples = values.data();
  ssod::run_team(threads, [&](ssod::ThreadTeam& team) {
    for (int64_t problem = 0; problem < batch; ++problem) {
      ssod::gmm_solve<kHeld>(team, samples, ranges, problem, options, out);
      ssod::gmm_clear_padding(team, ranges, problem, out.keep);
    }
  });
  return py::make_tuple(threshold, keep, statistics, counters);
}

}  // namespace

PYBIND11_MODULE(gmm, m) {
  m.def("gmm_f32", &gmm<float>);
  m.def("gmm_f64", &gmm<double>);
}

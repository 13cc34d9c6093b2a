// Runs csrc/nms.h with a team of CPU threads, as a CUDA block runs it. Not part of the package.
#include "nms.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "thread_team.h"

namespace {

namespace py = pybind11;
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Indices of the kept boxes of one image, -1 behind them; scores and order are sorted.
template <typename T>
Array<int64_t> sweep(int threads, const Array<T>& boxes, const Array<int64_t>& labels, const Array<T>& scores,
                     const Array<int64_t>& order, double threshold, int64_t most) {
  Array<int64_t> index(most);
  std::vector<ssod::NmsBox<T>> kept(most);
  std::vector<int64_t> kept_labels(most), counts(threads);
  ssod::NmsTileState<T> tile;
  const ssod::NmsImage<T> image{
      boxes.data(), labels.data(),      scores.data(),        order.data(), scores.size(),
      kept.data(),  kept_labels.data(), index.mutable_data(), most,         ssod::threshold_in<T>(threshold)};
  ssod::run_team(threads, [&](ssod::ThreadTeam& team) { counts[team.rank()] = ssod::nms_sweep(team, image, tile); });
  for (const int64_t count : counts) {
    if (count != counts[0]) {
      throw std::runtime_error("the members of the team disagree about the count");
    }
  }
  return index;
}

}  // namespace

PYBIND11_MODULE(nms, m) {
  m.def("sweep_f32", &sweep<float>);
  m.def("sweep_f64", &sweep<double>);
  m.def("threshold_f32", &ssod::threshold_in<float>);
}

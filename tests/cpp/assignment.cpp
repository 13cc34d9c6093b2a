// Runs csrc/assignment.h, which CUDA blocks run, with threads of the CPU. Not part of the package.
#include "assignment.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "thread_team.h"

namespace {

namespace py = pybind11;
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

struct Options {
  int repeats;
  bool interleave, in_memory;
};

// Query of each entry, or -1.
template <typename T>
Array<int64_t> solve(const Array<T>& cost, int queries, const Array<int64_t>& keys, const Options& options,
                     int threads) {
  const int targets = static_cast<int>(cost.shape(0));
  const ssod::AssignmentMatrix<T> problem{cost.data(),     cost.shape(1),      targets, queries,
                                          options.repeats, options.interleave, 0};
  const int rows = problem.rows(), columns = problem.columns();
  std::vector<double> memory(ssod::AssignmentSpace::bytes(rows, columns, options.in_memory) / sizeof(double) + 1);
  const auto space = ssod::AssignmentSpace::carve(memory.data(), rows, columns, options.in_memory);
  Array<int64_t> result(problem.entries());
  const int64_t* key_data = keys.data();
  int64_t* out = result.mutable_data();
  ssod::run_team(threads, [&](ssod::ThreadTeam& team) {
    ssod::AssignmentMatrix<T> matrix = problem;
    ssod::TeamAssignment<ssod::ThreadTeam, T> assignment(team, matrix, space);
    const bool met = matrix.swapped() ? assignment.set_query_starts() : assignment.set_target_starts(key_data);
    const bool invalid = team.reduce(met ? 1 : 0, [](int a, int b) { return a | b; }) != 0;
    options.in_memory ? assignment.template solve<true>(invalid) : assignment.template solve<false>(invalid);
    for (int entry = team.rank(); entry < matrix.entries(); entry += team.size()) {
      out[entry] = assignment.query_of(entry);
    }
  });
  return result;
}

}  // namespace

PYBIND11_MODULE(assignment, m) {
  m.attr("columns_in_registers") = ssod::kBatch;
  py::class_<Options>(m, "Options").def(py::init<int, bool, bool>());
  m.def("solve_f32", &solve<float>);
  m.def("solve_f64", &solve<double>);
}

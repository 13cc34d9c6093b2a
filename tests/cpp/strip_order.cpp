// Calls csrc/strip_order.h for every position. Not part of the package.
#include "strip_order.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace {

std::vector<int64_t> level(int64_t height, int64_t width) {
  std::vector<int64_t> order;
  for (int64_t position = 0; position < height * width; ++position) {
    order.push_back(ssod::strip_token(position, height, width));
  }
  return order;
}

template <typename I>
std::vector<I> pyramid(const std::vector<int64_t>& sizes, I tokens) {
  std::vector<I> order;
  for (I position = 0; position < tokens; ++position) {
    order.push_back(ssod::strip_query<I>(position, sizes.data(), static_cast<int>(sizes.size() / 2), tokens));
  }
  return order;
}

}  // namespace

PYBIND11_MODULE(strip_order, m) {
  m.def("level", &level);
  m.def("pyramid", &pyramid<int64_t>);
  m.def("pyramid_int32", &pyramid<int32_t>);
}

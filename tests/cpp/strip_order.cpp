// Calls csrc/strip_order.h for every position. Not part of the package.
#include "strip_order.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

namespace {

std::vector<int64_t> level(int64_t height, int64_t width) {
  std::vector<int64_t> order;
  for (int64_t position = 0; position < height * width; ++position) {
    order.push_back(
        ssod::strip_token(static_cast<int32_t>(position), static_cast<int32_t>(height), static_cast<int32_t>(width)));
  }
  return order;
}

struct Level {
  int64_t height, width;
};

std::vector<int64_t> pyramid(const std::vector<std::array<int64_t, 2>>& sizes) {
  std::vector<Level> levels;
  int64_t tokens = 0;
  for (const auto& [height, width] : sizes) {
    levels.push_back({height, width});
    tokens += height * width;
  }
  std::vector<int64_t> order;
  for (int64_t position = 0; position < tokens; ++position) {
    order.push_back(ssod::pyramid_token(static_cast<int32_t>(position), levels.data()));
  }
  return order;
}

}  // namespace

PYBIND11_MODULE(strip_order, m) {
  m.def("level", &level);
  m.def("pyramid", &pyramid);
}

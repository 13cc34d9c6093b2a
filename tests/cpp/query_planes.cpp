// Reads the planes of queries as the CPU kernel of the matching cost does. Not part of the package.
#include <memory>

#include "cpu/matching_cost_rows.h"

template <typename T>
static bool readable() {
  const auto space = std::make_unique<ssod::CostWorkspace<T>>();
  const ssod::Planes<T> planes = space->query_planes().box;
  T sum = 0;
  for (int64_t i = 0; i < ssod::kQueryChunk; ++i) {
    const ssod::Box<T> box = planes.at(i);
    sum += box.x1 + box.y1 + box.x2 + box.y2 + box.area + box.angle;
  }
  return sum == 0;
}

int main() { return readable<float>() && readable<double>() ? 0 : 1; }

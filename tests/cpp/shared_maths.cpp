// Exposes csrc/boxes.h to pytest, pair by pair. Not part of the package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "boxes.h"

namespace {

using Row = std::array<double, 4>;

template <typename T>
ssod::Box<T> read(const Row& row, int64_t format, bool zero, bool with_angle) {
  ssod::Box<T> box = ssod::make_box(static_cast<T>(row[0]), static_cast<T>(row[1]), static_cast<T>(row[2]),
                                    static_cast<T>(row[3]), static_cast<ssod::Format>(format), zero);
  box.angle = with_angle ? ssod::box_angle(box, zero) : T(0);
  return box;
}

template <typename T>
double overlap(const Row& a, const Row& b, int64_t mode, int64_t format, int64_t eps_mode, double eps) {
  const auto rule = static_cast<ssod::EpsMode>(eps_mode);
  const bool zero = rule == ssod::EpsMode::zero, with_angle = mode == 4;
  T result{};
  ssod::with_rule(static_cast<ssod::Mode>(mode), zero, [&](auto m, auto z) {
    result = ssod::overlap<m(), z()>(read<T>(a, format, zero, with_angle), read<T>(b, format, zero, with_angle),
                                     ssod::make_eps<T>(rule, eps));
  });
  return static_cast<double>(result);
}

template <typename T>
std::array<Row, 2> gradients(const Row& a, const Row& b, int64_t mode, int64_t format, int64_t eps_mode, double eps,
                             double grad, bool nan_zero) {
  const auto rule = static_cast<ssod::EpsMode>(eps_mode);
  const bool zero = rule == ssod::EpsMode::zero, with_angle = mode == 4;
  ssod::CornerGrads<T> ga{}, gb{};
  ssod::with_rule(static_cast<ssod::Mode>(mode), zero, [&](auto m, auto z) {
    ssod::with_flag(nan_zero, [&](auto n) {
      ssod::overlap_gradients<m(), z(), n()>(read<T>(a, format, zero, with_angle), read<T>(b, format, zero, with_angle),
                                             ssod::make_eps<T>(rule, eps), static_cast<T>(grad), ga, gb);
    });
  });
  ga = ssod::to_format(ga, static_cast<ssod::Format>(format));
  gb = ssod::to_format(gb, static_cast<ssod::Format>(format));
  return {Row{ga.x1, ga.y1, ga.x2, ga.y2}, Row{gb.x1, gb.y1, gb.x2, gb.y2}};
}

}  // namespace

PYBIND11_MODULE(shared_maths, m) {
  m.def("overlap_f32", &overlap<float>);
  m.def("overlap_f64", &overlap<double>);
  m.def("gradients_f64", &gradients<double>);
}

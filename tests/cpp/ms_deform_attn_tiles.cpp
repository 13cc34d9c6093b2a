// Runs csrc/ms_deform_attn_tiles.h with threads of the CPU as the threads of a block run it. Not part of the package.
#include "ms_deform_attn_tiles.h"

#include "ms_deform_attn_host.h"

namespace {

// The threads of a block; a warp is some of them that follow each other.
class ThreadBlock {
 public:
  ThreadBlock(ssod::ThreadTeam& team, ThreadGroup::Slots& slots) : team_(team), group_(team, slots) {}
  int rank() const { return team_.rank(); }
  int size() const { return team_.size(); }
  void sync() { team_.sync(); }
  int32_t swap(int32_t value, int distance) { return group_.swap(value, distance); }
  int32_t next(int32_t& counter) { return std::atomic_ref<int32_t>(counter).fetch_add(1); }

 private:
  ssod::ThreadTeam& team_;
  ThreadGroup group_;
};

// The gradient of value, and the number of atomics that it took.
template <typename Traits, typename Shape>
py::tuple add_tiles(const Arguments<typename Traits::T>& arguments, const Array<typename Traits::T>& grad,
                    const Array<typename Traits::T>& lse) {
  using T = typename Traits::T;
  const auto tokens = static_cast<int32_t>(arguments.size(1)), channels = static_cast<int32_t>(arguments.size(3));
  const ssod::RowSchedule schedule{static_cast<int32_t>(arguments.queries()), static_cast<int32_t>(arguments.size(0)),
                                   static_cast<int32_t>(arguments.size(2)), Shape::kRows,
                                   arguments.queries() == tokens};
  Array<T> out(std::vector<int64_t>(arguments.value.shape(), arguments.value.shape() + 4));
  std::fill_n(out.mutable_data(), out.size(), T(0));
  const ssod::TileInput<Traits> in{arguments.samples(), schedule,          tokens, channels, grad.data(),
                                   lse.data(),          out.mutable_data()};
  const ssod::LevelSource source = arguments.source();
  std::vector<ssod::SampledLevel<T>> levels(source.count);
  auto board = std::make_unique<ssod::TileBoard<Traits, Shape>>();
  std::memset(static_cast<void*>(board.get()), 0xff, sizeof(*board));
  ThreadGroup::Slots slots(Shape::kThreads);
  HostMemory::adds = 0;
  ssod::run_team(Shape::kThreads, [&](ssod::ThreadTeam& team) {
    ThreadBlock block(team, slots);
    ssod::fill_levels(block, source, arguments.offset_scale, levels.data());
    for (int64_t i = 0; i < schedule.blocks(); ++i) {
      const auto rows = ssod::block_rows(schedule, static_cast<uint32_t>(i), levels.data(), source.count);
      for (int32_t slab = 0; slab * board->kWidth < channels; ++slab) {
        if (arguments.reference) {
          ssod::add_tile<true>(block, in, rows, slab, levels.data(), *board);
        } else {
          ssod::add_tile<false>(block, in, rows, slab, levels.data(), *board);
        }
        block.sync();  // tiles without samples end without one, and the next one takes the same board
      }
    }
  });
  return py::make_tuple(out, HostMemory::adds / Traits::kLanes);
}

}  // namespace

PYBIND11_MODULE(ms_deform_attn_tiles, m) {
  bind<float>(m, "Arguments32");
  bind<double>(m, "Arguments64");
  m.def("f32_2x4_16", &add_tiles<HostTraits<float, 2, 4, false>, ssod::TileShape<4, 2, 16>>);
  m.def("f32_4x1_32", &add_tiles<HostTraits<float, 4, 1, false>, ssod::TileShape<4, 4, 32>>);
  m.def("f64_2x2_16", &add_tiles<HostTraits<double, 2, 2, false>, ssod::TileShape<8, 4, 16>>);
  m.def("f32_8x4_128", &add_tiles<HostTraits<float, 8, 4, false>, ssod::TileShape<256, 32, 128>>);  // that of CUDA
  m.def("f64_1x8_128", &add_tiles<HostTraits<double, 1, 8, false>, ssod::TileShape<8, 2, 128>>);
}

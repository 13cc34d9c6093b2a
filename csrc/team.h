// A team: the threads that solve one problem together. Algorithms for a CUDA block are templates over it, so that the
// code a block runs on a GPU is run by threads of the CPU in tests/cpp.
//
// A team has
//   int rank() const, int size() const      which member this thread is, of how many;
//   void sync()                             a barrier: what any member wrote before it, every member sees after it;
//   T reduce(T value, op)                   op over the values of all members, the same result for each of them; op
//   must
//                                           be associative and commutative, T trivially copyable and of at most 16
//                                           bytes.
// sync() and reduce() are called by all members or by none. reduce() is a barrier too.
#pragma once

#include "boxes.h"

namespace ssod {

// A team of one.
struct SoloTeam {
  SSOD_HD constexpr int rank() const { return 0; }
  SSOD_HD constexpr int size() const { return 1; }
  SSOD_HD void sync() const {}
  template <typename T, typename Op>
  SSOD_HD T reduce(T value, Op) const {
    return value;
  }
};

constexpr int kMaxReduced = 16;  // bytes

}  // namespace ssod

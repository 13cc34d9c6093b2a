// Threads of the CPU as a team (csrc/team.h): what a CUDA block does, provable without a GPU. Not part of the package.
#pragma once

#include <barrier>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "team.h"

namespace ssod {

class ThreadTeam {
 public:
  struct Shared {
    explicit Shared(int size) : barrier(size), slots(static_cast<size_t>(size) * kMaxReduced), size(size) {}
    std::barrier<> barrier;
    std::vector<unsigned char> slots;
    int size;
  };

  ThreadTeam(Shared& shared, int rank) : shared_(shared), rank_(rank) {}

  int rank() const { return rank_; }
  int size() const { return shared_.size; }
  void sync() { shared_.barrier.arrive_and_wait(); }

  template <typename T, typename Op>
  T reduce(T value, Op op) {
    static_assert(sizeof(T) <= kMaxReduced);
    std::memcpy(&shared_.slots[static_cast<size_t>(rank_) * kMaxReduced], &value, sizeof(T));
    sync();
    T result;
    std::memcpy(&result, &shared_.slots[0], sizeof(T));
    for (int member = 1; member < shared_.size; ++member) {
      T other;
      std::memcpy(&other, &shared_.slots[static_cast<size_t>(member) * kMaxReduced], sizeof(T));
      result = op(result, other);
    }
    sync();  // nobody overwrites a slot that somebody still reads
    return result;
  }

 private:
  Shared& shared_;
  int rank_;
};

// Runs work(team) on `size` threads and waits for all of them.
inline void run_team(int size, const std::function<void(ThreadTeam&)>& work) {
  ThreadTeam::Shared shared(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&shared, &work, rank] {
      ThreadTeam team(shared, rank);
      work(team);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace ssod

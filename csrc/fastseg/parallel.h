// Threading of the CPU kernels, on torch's own pool (torch.set_num_threads is obeyed).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace fastseg {

inline int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t floor_divide(int64_t value, int64_t divisor) {
  return value >= 0 ? value / divisor : -ceil_divide(-value, divisor);
}

// How many slices parallel_slices() cuts `count` items into: one per thread, each of `smallest` items or more.
inline int64_t slice_count(int64_t count, int64_t smallest = 1) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(1, smallest)));
}

// Calls body(take) on every thread; take() returns the next slice that no thread has taken, or -1 after the last one.
// `body` must not throw.
template <typename Body>
void share_slices(int64_t slices, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    const int64_t slice = next++;
    return slice < slices ? slice : -1;
  };
  const int64_t threads = slice_count(slices);
  if (threads == 1) {
    body(take);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) body(take);
  });
}

// Calls body(slice, begin, end) for `slices` contiguous slices of [0, count), in parallel. The cut depends on `slices`
// alone, so per-slice partial results, added up in slice order, are the same on every run. `body` must not throw.
template <typename Body>
void parallel_slices(int64_t count, int64_t slices, const Body& body) {
  share_slices(slices, [&](const auto& take) {
    for (int64_t slice = take(); slice >= 0; slice = take()) {
      body(slice, count * slice / slices, count * (slice + 1) / slices);
    }
  });
}

// Uneven slices, for threads of uneven speed (a busy machine, cores of two kinds): a large one for each thread, then
// small ones for the threads that are ready first. Otherwise like parallel_slices().
class UnevenSlices {
 public:
  // A thread's share, its large slice and kSmall small ones, has `smallest` items or more.
  explicit UnevenSlices(int64_t count, int64_t smallest = 1) : count_(count), large_(slice_count(count, smallest)) {}

  int64_t slices() const { return large_ == 1 ? 1 : large_ * (1 + kSmall); }
  int64_t begin(int64_t slice) const {
    if (large_ == 1) return slice * count_;
    const int64_t parts = slice <= large_ ? slice * kLarge : large_ * kLarge + (slice - large_);
    return count_ * parts / (large_ * (kLarge + kSmall));
  }
  // Does not call `body` for empty slices.
  template <typename Body>
  void run(const Body& body) const {
    share_slices(slices(), [&](const auto& take) {
      for (int64_t slice = take(); slice >= 0; slice = take()) {
        if (begin(slice) < begin(slice + 1)) body(slice, begin(slice), begin(slice + 1));
      }
    });
  }

 private:
  static constexpr int64_t kSmall = 3;  // small slices per thread
  static constexpr int64_t kLarge = 5;  // the size of a large slice, in small ones
  int64_t count_, large_;
};

}  // namespace fastseg

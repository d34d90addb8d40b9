// Threading of the CPU kernels, on torch's own pool (torch.set_num_threads is obeyed).
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace fastseg {

inline int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// How many slices parallel_slices() cuts `count` items into: one per thread, none of them empty.
inline int64_t slice_count(int64_t count, int64_t smallest = 1) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(1, smallest)));
}

// Calls body(slice, begin, end) for `slices` contiguous slices of [0, count), in parallel. The cut depends on `slices`
// alone, so per-slice partial results, added up in slice order, are the same on every run. `body` must not throw.
template <typename Body>
void parallel_slices(int64_t count, int64_t slices, const Body& body) {
  const auto run = [&](int64_t slice) { body(slice, count * slice / slices, count * (slice + 1) / slices); };
  if (slices == 1) {
    run(0);
    return;
  }
  torch::stable::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) run(slice);
  });
}

}  // namespace fastseg

// What a mean divides by, before the sweep that needs it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cross_entropy/sweep.h"

namespace fastseg::cross_entropy {

// From the labels alone, and the weights if there are any.
template <typename scalar_t>
double count_denominator(const Problem<scalar_t>& problem) {
  constexpr int64_t kChunk = 1 << 12;
  const int64_t count = problem.images * problem.pixels;
  const int64_t chunks = ceil_divide(count, kChunk);
  const UnevenSlices slices(chunks, 4);
  std::vector<Sums> partial(slices.slices());
  const bool weighted = problem.class_weight && problem.options.reduction == kMean;
  slices.run([&](int64_t slice, int64_t begin, int64_t end) {
    Scratch<int32_t> labels(kChunk);
    Sums sums;
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, count); first += kChunk) {
      const int here = static_cast<int>(std::min(kChunk, count - first));
      if (!weighted && !problem.pixel_weight) {
        int64_t valid = 0;
        sums.labels_in_range &= count_labels(problem.labels, first, here, valid);
        sums.denominator += static_cast<double>(valid);
        continue;
      }
      sums.labels_in_range &= load_labels(problem.labels, first, here, here, labels.get());
      for (int i = 0; i < here; ++i) {
        const int32_t label = labels.get()[i];
        if (label < 0) continue;
        sums.denominator += double(weighted ? problem.class_weight[label] : 1) *
                            double(problem.pixel_weight ? problem.pixel_weight[first + i] : 1);
      }
    }
    partial[slice] = sums;
  });
  Sums total;
  for (const Sums& sums : partial) {
    total.denominator += sums.denominator;
    total.labels_in_range &= sums.labels_in_range;
  }
  if (!total.labels_in_range) throw_bad_label(problem.labels, count);
  return total.denominator;
}

}  // namespace fastseg::cross_entropy

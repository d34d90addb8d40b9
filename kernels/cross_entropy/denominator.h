// What a mean divides by, before the sweep that needs it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cross_entropy/problem.h"

namespace fastseg::cross_entropy {

// From the labels alone, and the weights if there are any.
template <typename scalar_t>
double count_denominator(const Problem<scalar_t>& problem) {
  constexpr int64_t kChunk = 1 << 12;
  const int64_t count = problem.images * problem.pixels;
  const bool weighted = problem.class_weight && problem.options.reduction == kMean;
  const auto chunks = [&](int64_t begin, int64_t end) {
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
    return sums;
  };
  return sum_of_slices(problem, ceil_divide(count, kChunk), 4, chunks).denominator;
}

}  // namespace fastseg::cross_entropy

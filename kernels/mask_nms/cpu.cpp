// Greedy suppression of packed masks: a mask is compared with those kept before it, until one suppresses it. See
// README.md.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "fastseg/packed_masks.h"

namespace {

using fastseg::dense_output;
using fastseg::dense_values;
using fastseg::KnownMasks;
using torch::stable::Tensor;

constexpr int64_t kBlock = 32;  // masks that are compared in parallel with all masks kept before them

struct Problem {
  KnownMasks masks;
  const int64_t* labels;  // [N] or null
  double threshold;

  bool suppresses(int64_t i, int64_t j) const {
    if (labels != nullptr && labels[i] != labels[j]) return false;
    const fastseg::Overlap at(masks.boxes[i], masks.boxes[j]);
    // The most the IoU could be: it grows with the intersection.
    const int64_t areas = masks.areas[i] + masks.areas[j];
    const int64_t most = std::min({masks.areas[i], masks.areas[j], at.pixels});
    if (!(fastseg::ratio(most, areas - most) > threshold)) return false;
    const int64_t common = fastseg::intersection(masks.mask(i), masks.mask(j), at, masks.pitch);
    return fastseg::ratio(common, areas - common) > threshold;
  }
};

// order: [N]; kept: [most]. Returns how many masks are kept.
int64_t suppress(const Problem& problem, const int64_t* order, int64_t most, int64_t* kept) {
  const int64_t count = problem.masks.count;
  int64_t number = 0;
  for (int64_t first = 0; first < count && number < most; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first), before = number;
    bool suppressed[kBlock]{};
    const auto compare = [&](int64_t place, int64_t from) {
      for (int64_t k = from; k < number && !suppressed[place]; ++k) {
        suppressed[place] = problem.suppresses(kept[k], order[first + place]);
      }
    };
    if (before > 0) {
      fastseg::share_slices(size, [&](const auto& take) {
        for (int64_t place = take(); place >= 0; place = take()) compare(place, 0);
      });
    }
    for (int64_t place = 0; place < size && number < most; ++place) {
      compare(place, before);
      if (!suppressed[place]) kept[number++] = order[first + place];
    }
  }
  return number;
}

void forward(const Tensor& words, const Tensor& area, const Tensor& boxes, const Tensor& order,
             std::optional<Tensor> labels, double iou_threshold, std::optional<int64_t> max_output, const Tensor& keep,
             const Tensor& count) {
  Problem problem{fastseg::known_masks(words, area, boxes, "_mask_nms"), nullptr, iou_threshold};
  const int64_t masks = problem.masks.count, room = keep.numel();
  problem.labels = dense_values<int64_t>(labels, masks, "labels");
  const int64_t* ranked = dense_values<int64_t>(order, masks, "order");
  for (int64_t place = 0; place < masks; ++place) {
    FASTSEG_CHECK(ranked[place] >= 0 && ranked[place] < masks, "fastseg::_mask_nms: order holds no index of a mask");
  }
  FASTSEG_CHECK(room >= (max_output ? 0 : masks), "fastseg::_mask_nms: keep has no room for all masks");
  int64_t* kept = dense_output<int64_t>(keep, room, "keep");
  int64_t* found = dense_output<int64_t>(count, 1, "count");
  const int64_t number = suppress(problem, ranked, room, kept);
  std::fill(kept + number, kept + room, int64_t{-1});
  *found = number;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_mask_nms", TORCH_BOX(&forward)); }

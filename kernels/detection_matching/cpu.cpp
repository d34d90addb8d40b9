// COCO's matching of detections with truths, and its precision and recall. reference.py is the definition.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "fastseg/dense.h"
#include "fastseg/parallel.h"

namespace fastseg {
namespace {

enum State : uint8_t { kFalse = 0, kTrue = 1, kIgnored = 2 };

// Checks that offsets [groups + 1] begin with 0, do not fall, and end with `count`.
void check_offsets(const int64_t* offsets, int64_t groups, int64_t count, const char* name) {
  bool rising = groups >= 0 && offsets[0] == 0 && offsets[groups] == count;
  for (int64_t group = 0; rising && group < groups; ++group) rising = offsets[group] <= offsets[group + 1];
  FASTSEG_CHECK(rising, name, " must rise from 0 to ", count);
}

// One image and category: its detections by falling score, its truths, and the IoU of all pairs.
struct Group {
  int64_t detections, truths;
  const double* ious;   // [detections, truths]
  const bool* crowd;    // [truths]
  const bool* ignored;  // [truths], for one range of areas
  const bool* outside;  // [detections]
};

// Writes states [detections] at one threshold; `taken` [truths] is scratch.
void match(const Group& group, double threshold, std::vector<char>& taken, uint8_t* states) {
  std::fill_n(taken.begin(), group.truths, 0);
  for (int64_t d = 0; d < group.detections; ++d) {
    const double* row = group.ious + d * group.truths;
    int64_t best = -1;
    for (const bool ignores : {false, true}) {  // ignored truths only if no other one matches
      double least = threshold;
      for (int64_t g = 0; g < group.truths; ++g) {
        if (group.ignored[g] != ignores || !(row[g] >= least) || (taken[g] && !group.crowd[g])) continue;
        best = g, least = row[g];  // of equal IoUs the last
      }
      if (best >= 0) break;
    }
    if (best >= 0) {
      taken[best] = 1;
      states[d] = group.ignored[best] ? kIgnored : kTrue;
    } else {
      states[d] = group.outside[d] ? kIgnored : kFalse;
    }
  }
}

void match_detections(const Tensor& ious, const Tensor& detections, const Tensor& truths, const Tensor& ignored,
                      const Tensor& crowd, const Tensor& outside, const Tensor& thresholds, const Tensor& states) {
  FASTSEG_CHECK(ignored.dim() == 2 && outside.dim() == 2 && detections.numel() >= 1,
                "ignored and outside must be matrices, detections must have an element");
  const int64_t ranges = ignored.size(0), truth_count = ignored.size(1), count = outside.size(1);
  const int64_t groups = detections.numel() - 1, levels = thresholds.numel();
  const int64_t* first_detection = dense_values<int64_t>(detections, groups + 1, "detections");
  const int64_t* first_truth = dense_values<int64_t>(truths, groups + 1, "truths");
  check_offsets(first_detection, groups, count, "detections");
  check_offsets(first_truth, groups, truth_count, "truths");
  std::vector<int64_t> first_iou(groups + 1);
  int64_t most_truths = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t own = first_truth[group + 1] - first_truth[group];
    first_iou[group + 1] = first_iou[group] + own * (first_detection[group + 1] - first_detection[group]);
    most_truths = std::max(most_truths, own);
  }
  const double* iou = dense_values<double>(ious, first_iou[groups], "ious");
  const double* threshold = dense_values<double>(thresholds, levels, "thresholds");
  const bool* is_ignored = dense_values<bool>(ignored, ranges * truth_count, "ignored");
  const bool* is_crowd = dense_values<bool>(crowd, truth_count, "crowd");
  const bool* is_outside = dense_values<bool>(outside, ranges * count, "outside");
  uint8_t* to = dense_output<uint8_t>(states, ranges * levels * count, "states");

  constexpr int64_t kFewestGroups = 64;  // of a thread
  const UnevenSlices slices(groups, kFewestGroups);
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    std::vector<char> taken(most_truths);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t d = first_detection[index], g = first_truth[index];
      for (int64_t range = 0; range < ranges; ++range) {
        const Group group{
            first_detection[index + 1] - d,       first_truth[index + 1] - g,    iou + first_iou[index], is_crowd + g,
            is_ignored + range * truth_count + g, is_outside + range * count + d};
        for (int64_t level = 0; level < levels; ++level) {
          match(group, std::min(threshold[level], 1 - 1e-10), taken, to + (range * levels + level) * count + d);
        }
      }
    }
  });
}

// Of one category, range of areas, threshold and number of detections per image.
struct Curve {
  int64_t positives;
  std::vector<double> precision;  // at the n-th hit; write() makes it the largest from there on

  // Writes the precision at recall threshold r to to[r * step]; returns the last recall.
  double write(const double* recall_thresholds, int64_t count, int64_t step, double* to) {
    const int64_t hits = static_cast<int64_t>(precision.size());
    for (int64_t n = hits - 1; n > 0; --n) precision[n - 1] = std::max(precision[n - 1], precision[n]);
    for (int64_t r = 0; r < count; ++r) {
      const double early = recall_thresholds[r] * positives - 2;  // below the hit, whatever the rounding
      int64_t n = early > 0 ? static_cast<int64_t>(std::min<double>(early, hits)) : 0;
      while (n < hits && static_cast<double>(n + 1) / positives < recall_thresholds[r]) ++n;
      to[r * step] = n < hits ? precision[n] : 0.0;
    }
    return static_cast<double>(hits) / positives;
  }
};

void precision_recall(const Tensor& states, const Tensor& ranks, const Tensor& order, const Tensor& categories,
                      const Tensor& positives, const Tensor& max_detections, const Tensor& recall_thresholds,
                      const Tensor& precision, const Tensor& recall) {
  FASTSEG_CHECK(states.dim() == 3 && categories.numel() >= 1, "states must be [ranges, thresholds, detections]");
  const int64_t ranges = states.size(0), levels = states.size(1), count = states.size(2);
  const int64_t kinds = categories.numel() - 1, limits = max_detections.numel(), recalls = recall_thresholds.numel();
  const uint8_t* state = dense_values<uint8_t>(states, ranges * levels * count, "states");
  const int64_t* rank = dense_values<int64_t>(ranks, count, "ranks");
  const int64_t* by_score = dense_values<int64_t>(order, count, "order");
  const int64_t* first = dense_values<int64_t>(categories, kinds + 1, "categories");
  const int64_t* positive = dense_values<int64_t>(positives, kinds * ranges, "positives");
  const int64_t* limit = dense_values<int64_t>(max_detections, limits, "max_detections");
  const double* at = dense_values<double>(recall_thresholds, recalls, "recall_thresholds");
  check_offsets(first, kinds, count, "categories");
  for (int64_t i = 0; i < count; ++i) {
    FASTSEG_CHECK(by_score[i] >= 0 && by_score[i] < count, "order must hold numbers of detections");
  }
  // [levels, recalls, kinds, ranges, limits] and [levels, kinds, ranges, limits]
  double* precisions = dense_output<double>(precision, levels * recalls * kinds * ranges * limits, "precision");
  double* last_recall = dense_output<double>(recall, levels * kinds * ranges * limits, "recall");
  std::fill_n(precisions, precision.numel(), -1.0);
  std::fill_n(last_recall, recall.numel(), -1.0);

  const int64_t step = kinds * ranges * limits;
  const UnevenSlices slices(step * levels);
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {  // [kinds, ranges, limits, levels]
      const int64_t level = item % levels, place = item / levels, m = place % limits, range = place / limits % ranges;
      const int64_t kind = place / limits / ranges;
      Curve curve{positive[kind * ranges + range], {}};
      if (curve.positives <= 0) continue;
      const uint8_t* own = state + (range * levels + level) * count;
      int64_t hits = 0, misses = 0;
      for (int64_t i = first[kind]; i < first[kind + 1]; ++i) {
        const int64_t d = by_score[i];
        if (rank[d] >= limit[m]) continue;
        misses += own[d] == kFalse;
        if (own[d] != kTrue) continue;
        ++hits;
        curve.precision.push_back(hits / (static_cast<double>(hits + misses) + 0x1p-52));
      }
      double* to = precisions + level * recalls * step + place;
      last_recall[level * step + place] = curve.write(at, recalls, step, to);
    }
  });
}

}  // namespace
}  // namespace fastseg

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_match_detections", TORCH_BOX(&fastseg::match_detections));
  m.impl("_precision_recall", TORCH_BOX(&fastseg::precision_recall));
}

// IoU of packed masks: the words of two masks are compared where their boxes overlap. See README.md.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "fastseg/packed_masks.h"

namespace {

using fastseg::KnownMasks;
using torch::stable::Tensor;

constexpr int64_t kTile = 16;  // masks; two such sets of packed masks stay in the second-level cache

enum Denominator : int64_t { kUnion, kSmaller, kNothing };

struct Problem {
  KnownMasks a, b;
  const bool* crowd;      // [M] or null
  const int64_t* labels;  // [N] or null, only if a is b: masks of different labels count as disjoint
  int64_t denominator;

  // value_t: float, or int64_t for the intersection alone.
  template <typename value_t>
  value_t iou(int64_t i, int64_t j) const {
    if (labels != nullptr && labels[i] != labels[j]) return 0;
    const fastseg::Overlap at(a.boxes[i], b.boxes[j]);
    const int64_t common = fastseg::intersection(a.mask(i), b.mask(j), at, a.pitch);
    if constexpr (std::is_same_v<value_t, int64_t>) return common;
    const int64_t area_a = a.areas[i], area_b = b.areas[j];
    int64_t whole = denominator == kSmaller ? std::min(area_a, area_b) : area_a + area_b - common;
    if (crowd != nullptr && crowd[j]) whole = area_a;
    return static_cast<value_t>(fastseg::ratio(common, whole));
  }
};

// iou: [N]
template <typename value_t>
void in_pairs(const Problem& problem, value_t* iou) {
  const fastseg::UnevenSlices slices(problem.a.count, kTile);
  slices.run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) iou[i] = problem.iou<value_t>(i, i);
  });
}

// iou: [N, M]; symmetric: a is b, so that each pair is compared once.
template <typename value_t>
void all_with_all(const Problem& problem, bool symmetric, value_t* iou) {
  const int64_t rows = problem.a.count, columns = problem.b.count;
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = 0; i < rows; i += kTile) {
    for (int64_t j = symmetric ? i : 0; j < columns; j += kTile) tiles.push_back({i, j});
  }
  fastseg::share_slices(static_cast<int64_t>(tiles.size()), [&](const auto& take) {
    for (int64_t tile = take(); tile >= 0; tile = take()) {
      const auto [first_row, first_column] = tiles[tile];
      for (int64_t i = first_row; i < std::min(rows, first_row + kTile); ++i) {
        for (int64_t j = first_column; j < std::min(columns, first_column + kTile); ++j) {
          if (symmetric && j < i) continue;
          const value_t value = problem.iou<value_t>(i, j);
          iou[i * columns + j] = value;
          if (symmetric) iou[j * columns + i] = value;
        }
      }
    }
  });
}

template <typename value_t>
void fill(const Problem& problem, bool pairs, const Tensor& iou) {
  const int64_t rows = problem.a.count, columns = problem.b.count;
  value_t* to = fastseg::dense_output<value_t>(iou, pairs ? rows : rows * columns, "iou");
  if (pairs) return in_pairs(problem, to);
  const bool same = problem.a.words == problem.b.words && problem.a.areas == problem.b.areas &&
                    problem.a.boxes == problem.b.boxes && rows == columns;
  all_with_all(problem, same && problem.crowd == nullptr, to);
}

void forward(const Tensor& words_a, const Tensor& area_a, const Tensor& boxes_a, const Tensor& words_b,
             const Tensor& area_b, const Tensor& boxes_b, std::optional<Tensor> crowd, std::optional<Tensor> labels,
             int64_t denominator, bool pairs, const Tensor& iou) {
  constexpr const char* op = "_mask_iou";
  Problem problem{fastseg::known_masks(words_a, area_a, boxes_a, op),
                  fastseg::known_masks(words_b, area_b, boxes_b, op), nullptr, nullptr, denominator};
  const int64_t rows = problem.a.count, columns = problem.b.count;
  FASTSEG_CHECK(
      problem.a.height == problem.b.height && problem.a.pitch == problem.b.pitch && (!pairs || rows == columns),
      "fastseg::_mask_iou: the masks of a and b differ in size or number");
  FASTSEG_CHECK(!labels || rows == columns, "fastseg::_mask_iou: b must be a, with labels");
  problem.crowd = fastseg::dense_values<bool>(crowd, columns, "crowd");
  problem.labels = fastseg::dense_values<int64_t>(labels, rows, "labels");
  if (denominator == kNothing) return fill<int64_t>(problem, pairs, iou);
  fill<float>(problem, pairs, iou);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_mask_iou", TORCH_BOX(&forward)); }

// Soft-NMS on the CPU. A score is decayed by earlier picks only when it is the highest waiting one. Scores never rise,
// so the highest score that all picks have decayed is the next pick. See README.md.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/arguments.h"
#include "nms/arguments.h"
#include "nms/order.h"
#include "nms/overlap.h"
#include "soft_nms/math.h"

namespace {

using fastseg::dense_output;
using fastseg::dense_values;
using fastseg::nms::Box;
using fastseg::nms::Boxes;
using fastseg::nms::Groups;
using fastseg::nms::score_key;
using fastseg::nms::stable_order;
using fastseg::soft_nms::Decay;
using simd::kLanes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename real_t>
struct Waiting {
  fastseg::nms::score_key_t<real_t> key;
  int32_t index;
  int32_t picks_applied;  // the score is decayed by so many of the picks

  // The order of a heap whose front is the highest score; of equal scores, that of the lowest index.
  bool operator<(const Waiting& other) const { return key != other.key ? key > other.key : index > other.index; }
};

// `score` after the decay by the boxes at places [begin, end), in order. Blocks of 16 begin at `first`.
template <typename real_t>
real_t decay(const Boxes<real_t>& picked, int64_t first, int64_t begin, int64_t end, const Box<real_t>& box,
             real_t score, const Decay<real_t>& by) {
  const auto limit = simd::splat(by.threshold);
  for (int64_t place = begin - (begin - first) % kLanes; place < end; place += kLanes) {
    const auto overlap = picked.overlap(place, box);
    uint32_t lanes = simd::mask_bits(overlap > limit);
    if (place < begin) lanes &= ~0u << (begin - place);
    if (lanes == 0) continue;
    alignas(64) real_t overlaps[kLanes];
    simd::store(overlaps, overlap);
    for (; lanes != 0; lanes &= lanes - 1) score = by.decayed(score, overlaps[__builtin_ctz(lanes)]);
  }
  return score;
}

// boxes: [count, 4]. Decays the scores in place. Returns by index whether a box is picked; at most `most` of each
// class.
template <typename real_t>
std::vector<char> pick(const real_t* boxes, std::vector<real_t>& scores, const Groups& groups,
                       const std::vector<int32_t>& order, const Decay<real_t>& by, double min_score, int64_t most) {
  std::vector<char> is_picked(scores.size(), 0);
  std::vector<Waiting<real_t>> all(scores.size());
  // Each group has whole blocks of its own.
  Boxes<real_t> picked(static_cast<int64_t>(scores.size()) + kLanes * groups.count());
  groups.for_each([&](int64_t group) {
    const auto heap = all.begin() + groups.begin[group];
    auto end = heap;
    for (int32_t i = groups.begin[group]; i < groups.begin[group + 1]; ++i) {
      const int32_t index = order[groups.members[i]];
      if (!(scores[index] < min_score)) *end++ = {score_key(scores[index]), index, 0};
    }
    std::make_heap(heap, end);
    const int64_t first = groups.begin[group] + kLanes * group;
    for (int32_t picks = 0; end != heap && picks < most;) {
      std::pop_heap(heap, end);
      Waiting<real_t>& best = *(end - 1);
      const Box<real_t> box(boxes + 4 * int64_t{best.index});
      real_t& score = scores[best.index];
      score = decay(picked, first, first + best.picks_applied, first + picks, box, score, by);
      const auto key = score_key(score);
      if (score < min_score) {
        --end;
      } else if (key == best.key) {
        picked.set(first + picks++, box);
        is_picked[best.index] = 1;
        --end;
      } else {
        best.key = key;
        best.picks_applied = picks;
        std::push_heap(heap, end);
      }
    }
  });
  return is_picked;
}

template <typename real_t>
void soft_nms(const Tensor& boxes, const Tensor& given, const std::optional<Tensor>& idxs, const Decay<real_t>& by,
              double min_score, int64_t most, int64_t* indices, const Tensor& picked_scores, int64_t* found) {
  const int64_t count = given.numel();
  const real_t* corners = dense_values<real_t>(boxes, 4 * count, "boxes");
  const real_t* first_scores = dense_values<real_t>(given, count, "scores");
  real_t* results = dense_output<real_t>(picked_scores, most, "picked_scores");
  std::vector<real_t> scores(first_scores, first_scores + count);
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const Groups groups = fastseg::nms::make_groups(order, idxs ? idxs->const_data_ptr<int64_t>() : nullptr);
  const std::vector<char> is_picked = pick(corners, scores, groups, order, by, min_score, most);

  std::vector<int32_t> picks;
  std::vector<fastseg::nms::score_key_t<real_t>> keys;
  for (int32_t index = 0; index < count; ++index) {
    if (!is_picked[index]) continue;
    picks.push_back(index);
    keys.push_back(score_key(scores[index]));
  }
  int64_t place = 0;
  for (const int32_t position : stable_order(keys)) {
    if (place == most) break;
    indices[place] = picks[position];
    results[place++] = scores[picks[position]];
  }
  *found = place;
  std::fill(indices + place, indices + most, -1);
  std::fill(results + place, results + most, real_t(0));
}

void run(Tensor boxes, Tensor scores, std::optional<Tensor> idxs, double iou_threshold, bool gaussian, double sigma,
         double min_score, int64_t most, Tensor picked_scores, Tensor indices, Tensor count) {
  fastseg::nms::check_arguments("soft_nms", scores, idxs, most, indices, count);
  int64_t* picks = indices.mutable_data_ptr<int64_t>();
  int64_t* found = count.mutable_data_ptr<int64_t>();
  const auto run_as = [&](auto zero) {
    using real_t = decltype(zero);
    const auto by = Decay<real_t>::make(iou_threshold, gaussian, sigma);
    soft_nms(boxes, scores, idxs, by, min_score, most, picks, picked_scores, found);
  };
  boxes.scalar_type() == ScalarType::Double ? run_as(double{}) : run_as(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_soft_nms", TORCH_BOX(&run)); }

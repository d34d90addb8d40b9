// Box NMS on the CPU: boxes in the order of their scores, class by class, each against the 16-wide blocks of those kept
// before it. See README.md.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/arguments.h"
#include "nms/arguments.h"
#include "nms/math.h"
#include "nms/order.h"
#include "nms/overlap.h"

namespace {

using fastseg::dense_values;
using fastseg::nms::Box;
using fastseg::nms::Boxes;
using fastseg::nms::Groups;
using simd::kLanes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether one of the boxes at [first, first + count) suppresses `box`.
template <typename real_t>
bool is_suppressed(const Boxes<real_t>& kept, int64_t first, int64_t count, const Box<real_t>& box, real_t threshold) {
  const auto limit = simd::splat(threshold);
  for (int64_t place = first; place < first + count; place += kLanes) {
    if (simd::any(kept.overlap(place, box) > limit)) return true;
  }
  return false;
}

// boxes: [count, 4]. Returns by rank (the place in `order`) whether a box is kept; at most `most` of each class are.
template <typename real_t>
std::vector<char> sweep(const real_t* boxes, const std::vector<int32_t>& order, const Groups& groups,
                        double iou_threshold, int64_t most) {
  const real_t threshold = fastseg::nms::rounded_down<real_t>(iou_threshold);
  std::vector<char> is_kept(order.size(), 0);
  // Each group has whole blocks of its own.
  Boxes<real_t> kept(static_cast<int64_t>(order.size()) + kLanes * groups.count());
  groups.for_each([&](int64_t group) {
    const int64_t first = groups.begin[group] + kLanes * group;
    int64_t count = 0;
    for (int32_t i = groups.begin[group]; i < groups.begin[group + 1] && count < most; ++i) {
      const int32_t rank = groups.members[i];
      const Box<real_t> box(boxes + 4 * int64_t{order[rank]});
      if (is_suppressed(kept, first, count, box, threshold)) continue;
      kept.set(first + count++, box);
      is_kept[rank] = 1;
    }
  });
  return is_kept;
}

template <typename real_t>
void suppress(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold,
              int64_t* indices, int64_t most, int64_t* found) {
  const int64_t count = scores.numel();
  const real_t* corners = dense_values<real_t>(boxes, 4 * count, "boxes");
  const real_t* score = dense_values<real_t>(scores, count, "scores");
  std::vector<fastseg::nms::score_key_t<real_t>> keys(count);
  std::transform(score, score + count, keys.begin(), fastseg::nms::score_key<real_t>);
  const std::vector<int32_t> order = fastseg::nms::stable_order(keys);
  const Groups groups = fastseg::nms::make_groups(order, idxs ? idxs->const_data_ptr<int64_t>() : nullptr);
  const std::vector<char> is_kept = sweep(corners, order, groups, iou_threshold, most);
  int64_t place = 0;
  for (int64_t rank = 0; rank < count && place < most; ++rank) {
    if (is_kept[rank]) indices[place++] = order[rank];
  }
  *found = place;
  std::fill(indices + place, indices + most, -1);
}

void nms(Tensor boxes, Tensor scores, std::optional<Tensor> idxs, double iou_threshold, int64_t most, Tensor indices,
         Tensor count) {
  fastseg::nms::check_arguments("nms", scores, idxs, most, indices, count);
  int64_t* kept = indices.mutable_data_ptr<int64_t>();
  int64_t* found = count.mutable_data_ptr<int64_t>();
  if (boxes.scalar_type() == ScalarType::Double) {
    suppress<double>(boxes, scores, idxs, iou_threshold, kept, most, found);
  } else {
    suppress<float>(boxes, scores, idxs, iou_threshold, kept, most, found);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_nms", TORCH_BOX(&nms)); }

// Shared by forward and backward of the softmax statistics: the call, and the softmax of one tile.
#pragma once

#include "fastseg/tile_softmax.h"

namespace softmax_statistics {

using namespace fastseg;

// One call, its tensors as pointers. accumulate_t is float, double for fp64.
template <typename scalar_t>
struct Problem {
  using accumulate_t = simd::accumulate<scalar_t>;
  int64_t images, classes, pixels;   // N, C, P
  PixelView<const scalar_t> logits;  // [N, C, P]
  LabelView labels;                  // [N, P]
  const accumulate_t* class_weight;  // [C] or null
  const accumulate_t* pixel_weight;  // [N, P] or null
  double label_smoothing;
  bool squared;

  accumulate_t weight_of(int64_t c) const { return class_weight ? class_weight[c] : accumulate_t(1); }
  accumulate_t weight_total() const {
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) total += weight_of(c);
    return static_cast<accumulate_t>(total);
  }
};

// The softmax of one tile at a time, with the numbers both passes need per pixel.
template <typename scalar_t>
class SoftmaxTile {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  using mask_t = simd::mask<accumulate_t>;

  SoftmaxTile(const Problem<scalar_t>& problem, PixelView<scalar_t> gradient)
      : problem(problem), access(problem.logits, gradient, problem.classes), pixels(access.tile()), rows(access.rows()),
        stride(access.row_stride()), values_(7 * pixels), label_values_(pixels + pixels / kLanes),
        labels(label_values_.get()), common_label(labels + pixels) {
    accumulate_t* next = values_.get();
    for (accumulate_t** array : {&maximum, &sum, &inverse, &class_sum, &share, &target_weight, &label_gap}) {
      *array = next;
      next += pixels;
    }
  }

  // Labels and weights of the tile; false if a label is out of range.
  bool load_pixels(int64_t position, int count) {
    const bool in_range = load_labels(problem.labels, position, count, pixels, labels);
    for (int i = 0; i < pixels; i += kLanes) common_label[i / kLanes] = fastseg::common_label(labels + i);
    for (int i = 0; i < pixels; ++i) target_weight[i] = share[i] = labels[i] >= 0 ? accumulate_t(1) : accumulate_t(0);
    for (int i = 0; problem.class_weight && i < count; ++i) {
      if (labels[i] >= 0) target_weight[i] = problem.class_weight[labels[i]];
    }
    for (int i = 0; problem.pixel_weight && i < count; ++i) {
      if (labels[i] >= 0) share[i] = problem.pixel_weight[position + i];
    }
    return in_range;
  }

  // For each of 16 pixels the value of its label's class: common(c) is a vector of one class, single(c, i) one number.
  // Ignored pixels get the value of any class.
  template <typename Common, typename Single>
  FASTSEG_INLINE vector_t of_label(int i, const Common& common, const Single& single) const {
    if (common_label[i / kLanes] >= 0) return common(common_label[i / kLanes]);
    alignas(64) accumulate_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = single(std::max(labels[i + lane], 0), i + lane);
    return simd::load(values);
  }
  FASTSEG_INLINE vector_t exponential_of_label(int i) const {
    return of_label(
        i, [&](int64_t c) { return simd::load(rows + c * stride + i); },
        [&](int64_t c, int k) { return rows[c * stride + k]; });
  }

  // inverse[i] = 1 / sum[i]; 0 for ignored pixels, whose exponentials are cleared if they are NaN.
  void invert_sums() {
    for (int i = 0; i < pixels; i += kLanes) {
      const mask_t valid = is_valid(i);
      const vector_t total = simd::load(sum + i);
      simd::store(inverse + i, simd::keep_where(valid, accumulate_t(1) / total));
      if (!simd::any(~valid & (total != total))) continue;
      for (int lane = i; lane < i + kLanes; ++lane) {
        for (int64_t c = 0; labels[lane] < 0 && c < problem.classes; ++c) rows[c * stride + lane] = 0;
      }
    }
  }

  FASTSEG_INLINE mask_t is_valid(int i) const {
    return simd::convert<mask_t>(simd::load(labels + i) >= simd::splat(int32_t(0)));
  }
  FASTSEG_INLINE mask_t is_label(int64_t c, int i) const {
    return simd::convert<mask_t>(simd::load(labels + i) == simd::splat(static_cast<int32_t>(c)));
  }

  const Problem<scalar_t>& problem;
  TileAccess<scalar_t> access;
  const int pixels;          // T
  accumulate_t* const rows;  // exponentials [C, T], rows `stride` apart
  const int64_t stride;
  accumulate_t* maximum;        // [T] largest logit
  accumulate_t* sum;            // [T] of the exponentials
  accumulate_t* inverse;        // [T] 1 / sum, 0 where ignored
  accumulate_t* class_sum;      // [T] forward: sum of w_c (logit_c - maximum); backward: sum of p_c h_c
  accumulate_t* share;          // [T] pixel weight, 0 where ignored
  accumulate_t* target_weight;  // [T] class weight of the label, 0 where ignored
  accumulate_t* label_gap;      // [T] forward: maximum - logit of the label; backward: factor of the smoothing

 private:
  Scratch<accumulate_t> values_;
  Scratch<int32_t> label_values_;

 public:
  int32_t* const labels;        // [T], -1 where ignored
  int32_t* const common_label;  // [T / 16] the class of 16 pixels, -1 if several
};

}  // namespace softmax_statistics

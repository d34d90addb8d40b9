// The arithmetic of one block of 16 cells in one output row: see README.md for the formulas.
//
// Along a cell the upsampled logits are linear, so their exponentials form a geometric sequence: two exponentials serve
// up to eight pixels. The normaliser of a pixel is the interpolation of the cell ends' largest logits: it is no smaller
// than any logit of the pixel. Where logits lie so far below it that this could lose bits (or are infinite or NaN), the
// block is computed "directly": every pixel's own maximum, one exponential per pixel and class.
#pragma once

#include "problem.h"

namespace upsample_cross_entropy {

constexpr float kLargestSpread = 60.0f;

// What does not depend on the number of steps: reading the cells, and the arithmetic between passes over the classes.
class BlockRowBase {
 public:
  BlockRowBase(const Problem& problem, Workspace& work, const Block& block, float fraction, int64_t image, int64_t row)
      : problem_(problem), work_(work), tile_(work.tile), block_(block), image_(image), row_(row),
        lower_(fraction), upper_(1.0f - fraction), classes_(problem.classes) {}

  f32x16 loss() const { return loss_; }

 protected:
  FASTSEG_INLINE f32x16 fraction(int k) const { return simd::load(block_.fraction[k]); }
  FASTSEG_INLINE float* ends(int64_t c) const { return work_.logits.get() + c * 2 * kLanes; }

  // Logits at the left and right ends of the cells. False if they cannot take the geometric path.
  template <bool consecutive>
  [[gnu::noinline]] bool read_cells() {
    f32x16 highest_left = simd::splat(-INFINITY), highest_right = highest_left;
    f32x16 lowest_left = simd::splat(INFINITY), lowest_right = lowest_left;
    for (int64_t c = 0; c < classes_; ++c) {
      const f32x16 left = between<consecutive>(c, 0), right = between<consecutive>(c, 1);
      simd::store(ends(c), left);
      simd::store(ends(c) + kLanes, right);
      highest_left = simd::maximum(highest_left, left);
      highest_right = simd::maximum(highest_right, right);
      lowest_left = simd::minimum(lowest_left, left);
      lowest_right = simd::minimum(lowest_right, right);
    }
    highest_left_ = highest_left;
    highest_right_ = highest_right;
    const f32x16 spread = simd::splat(kLargestSpread);
    const auto narrow = (highest_left - lowest_left <= spread) & (highest_right - lowest_right <= spread);
    return simd::mask_bits(narrow) == 0xffff;
  }

  template <bool consecutive>
  FASTSEG_INLINE f32x16 between(int64_t c, int end) const {
    const float* above = work_.upper + c * work_.stride + end;
    const float* below = work_.lower + c * work_.stride + end;
    if constexpr (consecutive) {
      return simd::load(above + block_.cell[0]) * upper_ + simd::load(below + block_.cell[0]) * lower_;
    } else {
      const i32x16 cell = simd::load(block_.cell);
      return simd::gather(above, cell) * upper_ + simd::gather(below, cell) * lower_;
    }
  }

  // Label smoothing: sum_c w_c logit_c at both ends.
  [[gnu::noinline]] void sum_weighted_logits() {
    weighted_left_ = weighted_right_ = f32x16{};
    for (int64_t c = 0; c < classes_; ++c) {
      weighted_left_ += simd::load(ends(c)) * weight_of(c);
      weighted_right_ += simd::load(ends(c) + kLanes) * weight_of(c);
    }
  }

  FASTSEG_INLINE f32x16 interpolate(f32x16 left, f32x16 right, int k) const {
    return left * (1.0f - fraction(k)) + right * fraction(k);
  }

  [[gnu::noinline]] void find_maximum() {
    for (int k = 0; k < problem_.plan.steps; ++k) tile_.norm[k] = simd::splat(-INFINITY);
    for (int64_t c = 0; c < classes_; ++c) {
      const f32x16 left = simd::load(ends(c)), right = simd::load(ends(c) + kLanes);
      for (int k = 0; k < problem_.plan.steps; ++k) {
        tile_.norm[k] = simd::maximum(tile_.norm[k], interpolate(left, right, k));
      }
    }
  }

  [[gnu::noinline]] bool has_nan() const {
    i32x16 nan{};
    for (int k = 0; k < problem_.plan.steps; ++k) nan |= tile_.sum[k] != tile_.sum[k];
    return simd::mask_bits(nan) != 0;
  }

  FASTSEG_INLINE bool has_label(int64_t c) const { return work_.present.get()[c + 1] != 0; }
  FASTSEG_INLINE i32x16 is_label(int64_t c, int k) const { return tile_.label[k] == static_cast<int32_t>(c); }

  // Losses, and the factors that the second pass over the classes needs.
  template <Task task>
  [[gnu::noinline]] void finish_pixels() {
    const int count = problem_.plan.steps;
    f32x16 total{};
    for (int k = 0; k < count; ++k) {
      const auto valid = tile_.label[k] >= 0;
      const f32x16 picked = tile_.picked[k];
      if constexpr (task != Task::kStatisticsGradient) {
        const f32x16 loss = simd::keep_where(valid, loss_of(k));
        if (problem_.losses) write_losses(loss, k);
        total += loss;
      }
      const f32x16 inverse = 1.0f / tile_.sum[k];
      if constexpr (task == Task::kGradient) tile_.inverse[k] = simd::keep_where(valid, tile_.through[k] * inverse);
      if constexpr (wants_dice(task)) tile_.inverse[k] = simd::keep_where(valid, inverse);
      if constexpr (task == Task::kStatistics) add_intersection(simd::exp_nonpositive(picked) * inverse, k);
      if constexpr (task == Task::kStatisticsGradient) {
        const f32x16 of_label = simd::exp_nonpositive(picked) * inverse;
        const f32x16 own = gather_intersection_gradient(k) * of_label;
        const f32x16 scale = problem_.squared ? inverse * inverse : inverse;
        tile_.through[k] = simd::keep_where(valid, tile_.through[k] - tile_.dice[k] * scale - own);
        tile_.dice[k] = simd::keep_where(valid, own - tile_.target[k]);
      }
    }
    loss_ += total;
  }

  FASTSEG_INLINE f32x16 loss_of(int k) const {
    const f32x16 loss = tile_.through[k] * simd::log(tile_.sum[k]) - tile_.target[k] * tile_.picked[k];
    if (problem_.label_smoothing == 0) return loss;
    const f32x16 weighted = interpolate(weighted_left_, weighted_right_, k);
    return loss - tile_.smooth[k] * (weighted - tile_.norm[k] * problem_.class_weight_sum);
  }

  [[gnu::noinline]] void write_losses(f32x16 lanes, int k) {
    alignas(64) float loss[kLanes];
    simd::store(loss, lanes);
    float* to = problem_.losses + (image_ * problem_.height() + row_) * problem_.width();
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t pixel = block_.pixel[k][lane];
      if (pixel < problem_.width()) to[pixel] = loss[lane];
    }
  }

  [[gnu::noinline]] void add_intersection(f32x16 lanes, int k) {
    alignas(64) float probability[kLanes];
    alignas(64) int32_t labels[kLanes];
    simd::store(probability, lanes);
    simd::store(labels, tile_.label[k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t label = labels[lane];
      if (label >= 0) work_.intersection[label * kLanes + lane] += probability[lane];
    }
  }

  [[gnu::noinline]] f32x16 gather_intersection_gradient(int k) const {
    alignas(64) float gathered[kLanes]{};
    alignas(64) int32_t labels[kLanes];
    simd::store(labels, tile_.label[k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t label = labels[lane];
      if (label >= 0) gathered[lane] = problem_.grad_intersection[image_ * classes_ + label];
    }
    return simd::load(gathered);
  }

  // Adds the gradient of one class: `whole` sums the pixels of each cell, `right` their shares of the right end.
  FASTSEG_INLINE void accumulate(int64_t c, f32x16 whole, f32x16 right) {
    const f32x16 left = whole - right;
    const f32x16 corners[4] = {left * upper_, right * upper_, left * lower_, right * lower_};
    float* to = work_.accumulators.get() + c * 4 * kLanes;
    for (int corner = 0; corner < 4; ++corner) {
      simd::store(to + corner * kLanes, simd::load(to + corner * kLanes) + corners[corner]);
    }
  }

  FASTSEG_INLINE float weight_of(int64_t c) const { return problem_.class_weight ? problem_.class_weight[c] : 1.0f; }

  void add_smoothing(f32x16& whole, f32x16& right) const {
    if (problem_.label_smoothing == 0) return;
    for (int k = 0; k < problem_.plan.steps; ++k) {
      whole += tile_.smooth[k];
      right += tile_.smooth[k] * fraction(k);
    }
  }

  const Problem& problem_;
  Workspace& work_;
  PixelTile& tile_;
  const Block& block_;
  int64_t image_, row_;
  float lower_, upper_;
  int64_t classes_;
  f32x16 highest_left_{}, highest_right_{}, weighted_left_{}, weighted_right_{}, loss_{};
};

// steps: pixels per lane of the geometric path; 0 stands for the direct path, which takes the number from the plan.
template <int steps, Task task>
class BlockRow : BlockRowBase {
 public:
  using BlockRowBase::BlockRowBase;
  using BlockRowBase::loss;

  void run() {
    const bool ordinary = problem_.plan.consecutive ? read_cells<true>() : read_cells<false>();
    if (problem_.label_smoothing > 0) sum_weighted_logits();
    if constexpr (direct) {
      find_maximum();
    } else {
      for (int k = 0; k < count(); ++k) tile_.norm[k] = interpolate(highest_left_, highest_right_, k);
      if (!ordinary) return run_directly();
    }
    exponentiate();
    if constexpr (!direct) {
      if (has_nan()) return run_directly();
    }
    finish_pixels<task>();
    if constexpr (task == Task::kStatistics) statistics();
    if (classes_ == 1) return;  // the probability is 1: exactly no gradient
    if constexpr (task == Task::kGradient) gradient();
    if constexpr (task == Task::kStatisticsGradient) statistics_gradient();
  }

 private:
  static constexpr bool direct = steps == 0;
  static constexpr int room = direct ? kMostSteps : steps;

  FASTSEG_INLINE int count() const { return direct ? problem_.plan.steps : steps; }

  void run_directly() {
    BlockRow<0, task> row(problem_, work_, block_, lower_, image_, row_);
    row.run();
    loss_ = row.loss();
  }

  // The exponentials of one class, pixel after pixel.
  struct Sequence {
    f32x16 first, second;  // direct: logits at the ends; else: exponential of the first pixel, and ratio to the next
    f32x16 exponential;

    FASTSEG_INLINE Sequence(const BlockRow& row, int64_t c)
        : first(simd::load(row.ends(c))), second(simd::load(row.ends(c) + kLanes)), exponential(first) {}
    // Call for k = 0, 1, 2, ...
    FASTSEG_INLINE f32x16 at(const BlockRow& row, int k) {
      if constexpr (direct) {  // 0 where no pixel counts, whatever the logits hold
        const f32x16 shifted = row.interpolate(first, second, k) - row.tile_.norm[k];
        return simd::keep_where(row.tile_.label[k] >= 0, simd::exp_nonpositive(shifted));
      }
      if (k > 0) exponential *= second;
      return exponential;
    }
  };

  // sum, picked and, for the Dice gradient, dice = sum_c h_c e_c (or h_c e_c^2).
  void exponentiate() {
    f32x16 sum[room]{}, picked[room]{}, dice[room]{};
    const f32x16 slope_of_norm = highest_right_ - highest_left_, first_fraction = fraction(0);
    for (int64_t c = 0; c < classes_; ++c) {
      const f32x16 left = simd::load(ends(c)), right = simd::load(ends(c) + kLanes);
      const f32x16 start = left - highest_left_, slope = right - left - slope_of_norm;
      if constexpr (!direct) {
        const f32x16 first = start + slope * first_fraction, ratio = slope * problem_.plan.step;
        if (problem_.half_digits) {
          simd::store(ends(c), simd::exp_to_half_digits(first));
          if constexpr (steps > 1) simd::store(ends(c) + kLanes, simd::exp_to_half_digits(ratio));
        } else {
          simd::store(ends(c), simd::exp_in_range(first));
          if constexpr (steps > 1) simd::store(ends(c) + kLanes, simd::exp_in_range(ratio));
        }
      }
      Sequence sequence(*this, c);
      for (int k = 0; k < count(); ++k) {
        const f32x16 exponential = sequence.at(*this, k);
        sum[k] += exponential;
        if constexpr (task == Task::kStatisticsGradient) {
          const float factor = problem_.grad_prediction[image_ * classes_ + c];
          dice[k] += (problem_.squared ? exponential * exponential : exponential) * factor;
        }
      }
      if (!has_label(c)) continue;
      for (int k = 0; k < count(); ++k) {
        const f32x16 shifted = direct ? interpolate(left, right, k) - tile_.norm[k] : start + slope * fraction(k);
        picked[k] = simd::select(is_label(c, k), shifted, picked[k]);
      }
    }
    for (int k = 0; k < count(); ++k) {
      tile_.sum[k] = sum[k];
      tile_.picked[k] = picked[k];
      tile_.dice[k] = dice[k];
    }
  }

  // Cross-entropy: p through - [c = label] target - w_c smooth.
  void gradient() {
    f32x16 inverse[room], inverse_right[room], smooth{}, smooth_right{};
    for (int k = 0; k < count(); ++k) {
      inverse[k] = tile_.inverse[k];
      inverse_right[k] = tile_.inverse[k] * fraction(k);
      tile_.target_right[k] = tile_.target[k] * fraction(k);
    }
    add_smoothing(smooth, smooth_right);
    for (int64_t c = 0; c < classes_; ++c) {
      f32x16 whole{}, right{};
      Sequence sequence(*this, c);
      if constexpr (direct) {
        for (int k = 0; k < count(); ++k) {
          const f32x16 exponential = sequence.at(*this, k);
          whole += exponential * inverse[k];
          right += exponential * inverse_right[k];
        }
      } else {  // Horner's rule in the ratio
        whole = inverse[room - 1];
        right = inverse_right[room - 1];
        for (int k = room - 2; k >= 0; --k) {
          whole = whole * sequence.second + inverse[k];
          right = right * sequence.second + inverse_right[k];
        }
        whole *= sequence.first;
        right *= sequence.first;
      }
      if (has_label(c)) subtract_target(c, whole, right);
      if (problem_.label_smoothing > 0) {
        whole -= smooth * weight_of(c);
        right -= smooth_right * weight_of(c);
      }
      accumulate(c, whole, right);
    }
  }

  FASTSEG_INLINE void subtract_target(int64_t c, f32x16& whole, f32x16& right) const {
    f32x16 target_whole{}, target_right{};
    for (int k = 0; k < count(); ++k) {
      target_whole += simd::keep_where(is_label(c, k), tile_.target[k]);
      target_right += simd::keep_where(is_label(c, k), tile_.target_right[k]);
    }
    whole -= target_whole;
    right -= target_right;
  }

  // Dice: sums of p^2 or p.
  void statistics() {
    for (int64_t c = 0; c < classes_; ++c) {
      float* to = work_.prediction + c * kLanes;
      f32x16 total = simd::load(to);
      Sequence sequence(*this, c);
      for (int k = 0; k < count(); ++k) {
        const f32x16 probability = sequence.at(*this, k) * tile_.inverse[k];
        total += problem_.squared ? probability * probability : probability;
      }
      simd::store(to, total);
    }
  }

  // p (h_c p + through) + [c = label] dice - w_c smooth; without the inner p when not squared.
  void statistics_gradient() {
    f32x16 smooth{}, smooth_right{};
    add_smoothing(smooth, smooth_right);
    for (int64_t c = 0; c < classes_; ++c) {
      const float factor = problem_.grad_prediction[image_ * classes_ + c];
      f32x16 whole{}, right{};
      Sequence sequence(*this, c);
      for (int k = 0; k < count(); ++k) {
        const f32x16 probability = sequence.at(*this, k) * tile_.inverse[k];
        const f32x16 inner = problem_.squared ? probability * factor : simd::splat(factor);
        const f32x16 value = probability * (inner + tile_.through[k]);
        whole += value;
        right += value * fraction(k);
      }
      if (has_label(c)) {
        for (int k = 0; k < count(); ++k) {
          const f32x16 extra = simd::keep_where(is_label(c, k), tile_.dice[k]);
          whole += extra;
          right += extra * fraction(k);
        }
      }
      accumulate(c, whole - smooth * weight_of(c), right - smooth_right * weight_of(c));
    }
  }
};

}  // namespace upsample_cross_entropy

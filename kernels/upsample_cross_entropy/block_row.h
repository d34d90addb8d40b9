// The arithmetic of one block of 16 cells in one output row: see README.md for the formulas.
//
// Along a cell the upsampled logits are linear, so their exponentials form a geometric sequence: two exponentials serve
// up to eight pixels. The normaliser of a pixel interpolates the largest logits of the cell's ends: it is no smaller
// than any logit of the pixel. Where logits lie so far below it that this could lose bits (or are infinite or NaN), the
// block is computed "directly": with each pixel's own maximum and one exponential per pixel and class.
#pragma once

#include "block_row_base.h"

namespace upsample_cross_entropy {

// steps: pixels per lane of the geometric path; 0: the direct path, with the number of the block.
template <int steps, Task task>
class BlockRow : BlockRowBase {
 public:
  using BlockRowBase::BlockRowBase, BlockRowBase::loss;

  void run() {
    const bool linear = read_cells(wants_dice(task) && problem_.squared);
    if constexpr (direct) {
      find_maximum();
    } else {
      if (!linear) return run_directly();
      exponentiate();
    }
    sum_exponentials();
    if (!direct && has_nan()) return run_directly();
    scale_pixels();
    if constexpr (task != Task::kStatisticsGradient) cross_entropy();
    if constexpr (task == Task::kStatistics) statistics();
    if (classes_ == 1) return;  // the probability is 1: exactly no gradient
    if constexpr (task == Task::kGradient) gradient();
    if constexpr (task == Task::kStatisticsGradient) statistics_gradient();
    if (wants_gradient(task) && problem_.label_smoothing > 0) subtract_smoothing();
  }

 private:
  static constexpr bool direct = steps == 0;
  static constexpr int room = direct ? kMostSteps : steps;

  FASTSEG_INLINE int count() const { return direct ? block_.steps : steps; }

  void run_directly() {
    BlockRow<0, task> row(problem_, work_, block_, image_, row_);
    row.run();
    loss_ = row.loss();
  }

  // Turns the logits at the ends of the cells into the exponential of the first pixel and the ratio to the next.
  void exponentiate() {
    const f32x16 slope_of_norm = highest_.right - highest_.left, first_fraction = fraction(0);
    for (int64_t c = 0; c < classes_; ++c) {
      const Ends logits = load_ends(c);
      const f32x16 slope = logits.right - logits.left - slope_of_norm;
      simd::store(ends(c), simd::exp_in_range(logits.left - highest_.left + slope * first_fraction));
      if constexpr (steps > 1) simd::store(ends(c) + kLanes, simd::exp_in_range(slope * problem_.plan.step));
    }
  }

  // The exponentials of one class, pixel after pixel.
  struct Sequence {
    f32x16 first, second;  // direct: logits at the ends; else: exponential of the first pixel, and ratio to the next
    f32x16 exponential;

    FASTSEG_INLINE Sequence(const BlockRow& all, int64_t c)
        : first(simd::load(all.ends(c))), second(simd::load(all.ends(c) + kLanes)), exponential(first) {}
    // Called for k = 0, 1, 2, ... in order.
    FASTSEG_INLINE f32x16 at(const BlockRow& all, int k) {
      if constexpr (direct) {  // 0 where no pixel counts, whatever the logits are
        const f32x16 shifted = all.interpolate({first, second}, k) - all.tile_.norm[k];
        return simd::keep_where(all.tile_.label[k] >= 0, simd::exp_nonpositive(shifted));
      }
      if (k > 0) exponential *= second;
      return exponential;
    }
  };

  // sum_k coefficients[k] x^k by Horner's rule.
  FASTSEG_INLINE static f32x16 polynomial(const f32x16* coefficients, f32x16 x) {
    f32x16 value = coefficients[room - 1];
    for (int k = room - 2; k >= 0; --k) value = value * x + coefficients[k];
    return value;
  }

  // Dice: e_k^2 (or, not squared, e_k), the terms of a sum of p^2 (or p), which form a geometric sequence too.
  struct Terms {
    f32x16 first, ratio;

    FASTSEG_INLINE Terms(const BlockRow& all, const Sequence& sequence)
        : first(sequence.first), ratio(sequence.second) {
      if (!all.problem_.squared) return;
      first *= first;
      ratio *= ratio;
    }
  };

  // The sums and, for the Dice gradient, dice = sum_c h_c e_c^2 (or h_c e_c).
  void sum_exponentials() {
    constexpr bool with_dice = task == Task::kStatisticsGradient;
    f32x16 sum[room], dice[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) sum[k] = dice[k] = f32x16{};
    for (int64_t c = 0; c < classes_; ++c) {
      const float factor = with_dice ? problem_.grad_prediction[image_ * classes_ + c] : 0.0f;
      Sequence sequence(*this, c);
      Terms terms(*this, sequence);
      terms.first *= factor;
      for (int k = 0; k < count(); ++k) {
        const f32x16 exponential = sequence.at(*this, k);
        sum[k] += exponential;
        if constexpr (with_dice && direct) {
          dice[k] += (problem_.squared ? exponential * exponential : exponential) * factor;
        } else if constexpr (with_dice) {
          dice[k] += terms.first;
          terms.first *= terms.ratio;
        }
      }
    }
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) {
      tile_.sum[k] = sum[k];
      if constexpr (with_dice) tile_.dice[k] = dice[k];
    }
  }

  // The factors that turn exponentials into probabilities or gradients, 0 where the label is ignored.
  void scale_pixels() {
    for (int k = 0; k < count(); ++k) {
      const f32x16 inverse = simd::keep_where(tile_.label[k] >= 0, 1.0f / tile_.sum[k]);
      tile_.inverse[k] = task == Task::kGradient ? tile_.through[k] * inverse : inverse;
    }
  }

  // The loss, and the label's part of its gradient.
  void cross_entropy() {
    const bool by_pixel = direct || problem_.losses || problem_.label_smoothing > 0;
    if (by_pixel) {
      add_pixel_losses<direct>();
    } else {
      for (int k = 0; k < steps; ++k) {
        loss_ += simd::keep_where(tile_.label[k] >= 0, tile_.through[k] * simd::log_finite(tile_.sum[k]));
      }
    }
    if (by_pixel && task != Task::kGradient) return;
    for_each_class(problem_, tile_.classes, [&](int64_t c) {
      const Ends target = sum_over_label(c, tile_.target);
      if (!by_pixel) {  // logits are linear in the fraction: those of single pixels are not needed
        const Ends logits = between(c);
        loss_ -= (logits.left - highest_.left) * target.left + (logits.right - highest_.right) * target.right;
      }
      if (task == Task::kGradient && classes_ > 1) accumulate(c, {-target.left, -target.right});
    });
  }

  // Sums of values over the pixels labelled c, divided between the ends of the cells.
  FASTSEG_INLINE Ends sum_over_label(int64_t c, const f32x16 (&values)[kMostSteps]) const {
    f32x16 total{}, right{};
    for (int k = 0; k < count(); ++k) {
      const f32x16 value = simd::keep_where(is_label(c, k), values[k]);
      total += value;
      right += value * fraction(k);
    }
    return {total - right, right};
  }

  // Cross-entropy: p through.
  void gradient() {
    f32x16 inverse[room], inverse_right[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) {
      inverse[k] = tile_.inverse[k];
      inverse_right[k] = tile_.inverse[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      f32x16 total{}, right{};
      Sequence sequence(*this, c);
      if constexpr (direct) {
        for (int k = 0; k < count(); ++k) {
          const f32x16 exponential = sequence.at(*this, k);
          total += exponential * inverse[k];
          right += exponential * inverse_right[k];
        }
      } else {
        total = sequence.first * polynomial(inverse, sequence.second);
        right = sequence.first * polynomial(inverse_right, sequence.second);
      }
      accumulate(c, {total - right, right});
    }
  }

  // Dice: sums of p^2 or p, and of the label's p and pixels.
  void statistics() {
    f32x16 scale[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) scale[k] = scale_of_terms(k);
    for (int64_t c = 0; c < classes_; ++c) {
      f32x16 prediction{};
      Sequence sequence(*this, c);
      if constexpr (direct) {
        for (int k = 0; k < count(); ++k) {
          const f32x16 probability = sequence.at(*this, k) * tile_.inverse[k];
          prediction += problem_.squared ? probability * probability : probability;
        }
      } else {
        const Terms terms(*this, sequence);
        prediction = terms.first * polynomial(scale, terms.ratio);
      }
      add(work_.prediction + c * kLanes, prediction);
    }
    for_each_class(problem_, tile_.classes, [&](int64_t c) {
      f32x16 truth{};
      for (int k = 0; k < count(); ++k) truth += simd::keep_where(is_label(c, k), simd::splat(1.0f));
      add(work_.truth + c * kLanes, truth);
      add(work_.intersection + c * kLanes, sum_of_label_probabilities(c));
    });
  }

  FASTSEG_INLINE f32x16 sum_of_label_probabilities(int64_t c) const {
    Sequence sequence(*this, c);
    f32x16 inverse[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) inverse[k] = simd::keep_where(is_label(c, k), tile_.inverse[k]);
    if constexpr (!direct) return sequence.first * polynomial(inverse, sequence.second);
    f32x16 sum{};
    for (int k = 0; k < count(); ++k) sum += sequence.at(*this, k) * inverse[k];
    return sum;
  }

  // p (h_c p + common) + [c = label] own, without the inner p when not squared.
  void statistics_gradient() {
    add_label_gradient();
    f32x16 scale[room], scale_right[room], common[room], common_right[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) {
      scale[k] = scale_of_terms(k);
      scale_right[k] = scale[k] * fraction(k);
      common[k] = tile_.common[k] * tile_.inverse[k];
      common_right[k] = common[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      const float factor = problem_.grad_prediction[image_ * classes_ + c];
      f32x16 total{}, right{};
      Sequence sequence(*this, c);
      if constexpr (direct) {
        for (int k = 0; k < count(); ++k) {
          const f32x16 probability = sequence.at(*this, k) * tile_.inverse[k];
          const f32x16 inner = problem_.squared ? probability * factor : simd::splat(factor);
          const f32x16 value = probability * (inner + tile_.common[k]);
          total += value;
          right += value * fraction(k);
        }
      } else {
        const f32x16 inner = problem_.squared ? sequence.first * factor : simd::splat(factor);
        const f32x16 ratio = Terms(*this, sequence).ratio;
        total = sequence.first * (inner * polynomial(scale, ratio) + polynomial(common, sequence.second));
        right = sequence.first * (inner * polynomial(scale_right, ratio) + polynomial(common_right, sequence.second));
      }
      accumulate(c, {total - right, right});
    }
  }

  // The factor from e^2 (or e) of pixels k to p^2 (or p).
  FASTSEG_INLINE f32x16 scale_of_terms(int k) const {
    return problem_.squared ? tile_.inverse[k] * tile_.inverse[k] : tile_.inverse[k];
  }

  // The second term, and common = smoothing - sum_c h_c p_c^2 (or h_c p_c) - own, where own = dI p - target of the
  // label. (As own enters both terms in the same rounding, all cancels where p = 1.)
  [[gnu::noinline]] void add_label_gradient() {
    f32x16 own[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) own[k] = f32x16{};
    for_each_class(problem_, tile_.classes, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
      const float factor = problem_.grad_intersection[image_ * classes_ + c];
      f32x16 total{}, right{};
      Sequence sequence(*this, c);
      if constexpr (!direct) sequence.exponential *= factor;
      for (int k = 0; k < count(); ++k) {
        const f32x16 exponential = direct ? sequence.at(*this, k) * factor : sequence.at(*this, k);
        const f32x16 value = exponential * tile_.inverse[k] - tile_.target[k];
        const auto labelled = is_label(c, k);
        own[k] = simd::select(labelled, value, own[k]);
        total = simd::select(labelled, total + value, total);
        right = simd::select(labelled, right + value * fraction(k), right);
      }
      accumulate(c, {total - right, right});
    });
    for (int k = 0; k < count(); ++k) {
      const f32x16 smoothing = tile_.through[k] - tile_.target[k];
      const f32x16 common = smoothing - tile_.dice[k] * scale_of_terms(k) - own[k];
      tile_.common[k] = simd::keep_where(tile_.label[k] >= 0, common);
    }
  }
};

}  // namespace upsample_cross_entropy

// The arithmetic of one block of 16 cells in one output row: see README.md for the formulas.
//
// Along a cell the upsampled logits are linear, so their exponentials form a geometric sequence: two exponentials serve
// up to eight pixels. The normaliser of a pixel is the interpolation of the cell ends' largest logits: it is no smaller
// than any logit of the pixel. Where logits lie so far below it that this could lose bits (or are infinite or NaN), the
// block is computed "directly": every pixel's own maximum, one exponential per pixel and class.
#pragma once

#include "block_row_base.h"

namespace upsample_cross_entropy {

// 256 + k in every lane.
struct alignas(64) PixelCounts {
  int32_t values[kMostSteps][kLanes];

  constexpr PixelCounts() : values() {
    for (int i = 0; i < kMostSteps * kLanes; ++i) values[i / kLanes][i % kLanes] = 256 + i / kLanes;
  }
};
inline constexpr PixelCounts kPixels;

// steps: pixels per lane of the geometric path; 0 stands for the direct path, which takes the number from the block.
template <int steps, Task task>
class BlockRow : BlockRowBase {
 public:
  using BlockRowBase::BlockRowBase;
  using BlockRowBase::loss;

  void run() {
    if constexpr (direct) {
      read_cells();
      find_maximum();
    } else if (work_.growth.active) {
      read_corners();
    } else {
      if (!read_cells()) return run_directly();
      exponentiate();
    }
    sum_exponentials();
    if constexpr (!direct) {
      if (!work_.growth.active && has_nan()) return run_directly();
    }
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
    BlockRow<0, task> row(problem_, work_, block_, lower_, image_, row_);
    row.run();
    loss_ = row.loss();
  }

  // From the logits at the ends of the cells to the exponential of the first pixel and the ratio to the next.
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

    FASTSEG_INLINE Sequence(const BlockRow& row, int64_t c)
        : first(simd::load(row.ends(c))), second(simd::load(row.ends(c) + kLanes)), exponential(first) {}
    // Call for k = 0, 1, 2, ...
    FASTSEG_INLINE f32x16 at(const BlockRow& row, int k) {
      if constexpr (direct) {  // 0 where no pixel counts, whatever the logits hold
        const f32x16 shifted = row.interpolate({first, second}, k) - row.tile_.norm[k];
        return simd::keep_where(row.tile_.label[k] >= 0, simd::exp_nonpositive(shifted));
      }
      if (k > 0) exponential *= second;
      return exponential;
    }
  };

  // sum_k coefficients[k] x^k by Horner's rule.
  FASTSEG_INLINE static f32x16 polynomial(const f32x16 (&coefficients)[room], f32x16 x) {
    f32x16 value = coefficients[room - 1];
    for (int k = room - 2; k >= 0; --k) value = value * x + coefficients[k];
    return value;
  }

  // Dice: where e_k^2 (or, not squared, e_k) is needed and forms a geometric sequence that stays within float.
  FASTSEG_INLINE bool has_terms() const { return !direct && (squares_fit_ || !problem_.squared); }
  struct Terms {
    f32x16 first, ratio;

    FASTSEG_INLINE Terms(const BlockRow& row, const Sequence& sequence)
        : first(sequence.first), ratio(sequence.second) {
      if (!row.problem_.squared) return;
      first *= first;
      ratio *= ratio;
    }
  };

  // sum and, for the Dice gradient, dice = sum_c h_c e_c (or h_c e_c^2).
  void sum_exponentials() {
    f32x16 sum[room], dice[room];
    for (int k = 0; k < room; ++k) sum[k] = dice[k] = f32x16{};  // (GCC zeroes whole arrays in memory)
    for (int64_t c = 0; c < classes_; ++c) {
      Sequence sequence(*this, c);
      if (task == Task::kStatisticsGradient && has_terms()) {
        Terms terms(*this, sequence);
        terms.first *= problem_.grad_prediction[image_ * classes_ + c];
        for (int k = 0; k < count(); ++k) {
          sum[k] += sequence.at(*this, k);
          dice[k] += terms.first;
          terms.first *= terms.ratio;
        }
        continue;
      }
      for (int k = 0; k < count(); ++k) {
        const f32x16 exponential = sequence.at(*this, k);
        sum[k] += exponential;
        if constexpr (task == Task::kStatisticsGradient) {
          const float factor = problem_.grad_prediction[image_ * classes_ + c];
          dice[k] += (problem_.squared ? exponential * exponential : exponential) * factor;
        }
      }
    }
    for (int k = 0; k < count(); ++k) {
      tile_.sum[k] = sum[k];
      if constexpr (task == Task::kStatisticsGradient) tile_.dice[k] = dice[k];
    }
  }

  // The factors that make exponentials into probabilities or gradients, 0 where the label is ignored.
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
      loss_ += sum_weighted_logarithms<room>();
    }
    if (by_pixel && task != Task::kGradient) return;
    const bool counts = !direct && problem_.plain();
    for_each_label(problem_, tile_, [&](int64_t c) {
      const Ends target = counts ? count_label(c) : sum_over_label(c, tile_.target);
      if (!by_pixel) {  // logits are linear in the fraction: no pixel's own is needed
        const Ends logits = between(c);
        loss_ -= (logits.left - highest_.left) * target.left + (logits.right - highest_.right) * target.right;
      }
      if (task == Task::kGradient && classes_ > 1) accumulate(c, -target.left, -target.right);
    });
  }

  // Sums of values[k] over the pixels labelled c, shared out between the ends of the cells.
  FASTSEG_INLINE Ends sum_over_label(int64_t c, const f32x16 (&values)[kMostSteps]) const {
    f32x16 whole{}, right{};
    for (int k = 0; k < count(); ++k) {
      const f32x16 value = simd::keep_where(is_label(c, k), values[k]);
      whole += value;
      right += value * fraction(k);
    }
    return {whole - right, right};
  }

  // Cross-entropy: p through.
  void gradient() {
    f32x16 inverse[room], inverse_right[room];
    for (int k = 0; k < count(); ++k) {
      inverse[k] = tile_.inverse[k];
      inverse_right[k] = tile_.inverse[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      f32x16 whole{}, right{};
      Sequence sequence(*this, c);
      if constexpr (direct) {
        for (int k = 0; k < count(); ++k) {
          const f32x16 exponential = sequence.at(*this, k);
          whole += exponential * inverse[k];
          right += exponential * inverse_right[k];
        }
      } else {
        whole = sequence.first * polynomial(inverse, sequence.second);
        right = sequence.first * polynomial(inverse_right, sequence.second);
      }
      accumulate(c, whole - right, right);
    }
  }

  // sum_over_label() where every pixel has the same target: in integers, half the operations. The fraction of pixel k
  // is that of pixel 0 and k steps.
  FASTSEG_INLINE Ends count_label(int64_t c) const {
    i32x16 counted{};  // 256 for every pixel, and its k
    for (int k = 0; k < count(); ++k) counted += simd::keep_where(is_label(c, k), simd::load(kPixels.values[k]));
    const f32x16 pixels = simd::convert<f32x16>(counted >> 8), steps_on = simd::convert<f32x16>(counted & 255);
    const f32x16 right = pixels * fraction(0) + steps_on * problem_.plan.step;
    return {(pixels - right) * problem_.grad_numerator, right * problem_.grad_numerator};
  }

  // Dice: sums of p^2 or p, and of the label's p and pixels.
  void statistics() {
    f32x16 scale[room];
    for (int k = 0; k < count(); ++k) scale[k] = scale_of_terms(k);
    for (int64_t c = 0; c < classes_; ++c) {
      f32x16 prediction{};
      Sequence sequence(*this, c);
      if (has_terms()) {
        const Terms terms(*this, sequence);
        add(work_.prediction + c * kLanes, terms.first * polynomial(scale, terms.ratio));
        continue;
      }
      for (int k = 0; k < count(); ++k) {
        const f32x16 probability = sequence.at(*this, k) * tile_.inverse[k];
        prediction += problem_.squared ? probability * probability : probability;
      }
      add(work_.prediction + c * kLanes, prediction);
    }
    for_each_label(problem_, tile_, [&](int64_t c) {
      f32x16 intersection{}, truth{};
      Sequence sequence(*this, c);
      for (int k = 0; k < count(); ++k) {
        const auto labelled = is_label(c, k);
        intersection += simd::keep_where(labelled, sequence.at(*this, k) * tile_.inverse[k]);
        truth += simd::keep_where(labelled, simd::splat(1.0f));
      }
      add(work_.intersection + c * kLanes, intersection);
      add(work_.truth + c * kLanes, truth);
    });
  }

  // p (h_c p + through) + [c = label] dice, without the inner p when not squared.
  void statistics_gradient() {
    combine_dice();
    f32x16 scale[room], scale_right[room], through[room], through_right[room];
    for (int k = 0; k < count(); ++k) {
      scale[k] = scale_of_terms(k);
      scale_right[k] = scale[k] * fraction(k);
      through[k] = tile_.through[k] * tile_.inverse[k];
      through_right[k] = through[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      const float factor = problem_.grad_prediction[image_ * classes_ + c];
      f32x16 whole{}, right{};
      Sequence sequence(*this, c);
      if (has_terms()) {
        const Terms terms(*this, sequence);
        const f32x16 first = terms.first * factor;
        whole = first * polynomial(scale, terms.ratio) + sequence.first * polynomial(through, sequence.second);
        right = first * polynomial(scale_right, terms.ratio) +
                sequence.first * polynomial(through_right, sequence.second);
        accumulate(c, whole - right, right);
        continue;
      }
      for (int k = 0; k < count(); ++k) {
        const f32x16 probability = sequence.at(*this, k) * tile_.inverse[k];
        const f32x16 inner = problem_.squared ? probability * factor : simd::splat(factor);
        const f32x16 value = probability * (inner + tile_.through[k]);
        whole += value;
        right += value * fraction(k);
      }
      accumulate(c, whole - right, right);
    }
    for_each_label(problem_, tile_, [&](int64_t c) {
      const Ends dice = sum_over_label(c, tile_.dice);
      accumulate(c, dice.left, dice.right);
    });
  }

  // What makes e_k^2 (or e_k) a p_k^2 (or p_k).
  FASTSEG_INLINE f32x16 scale_of_terms(int k) const {
    return problem_.squared ? tile_.inverse[k] * tile_.inverse[k] : tile_.inverse[k];
  }

  // through and dice of the formula above.
  void combine_dice() {
    f32x16 own[room];  // dI_c p_c of the label
    for (f32x16& lanes : own) lanes = f32x16{};
    for_each_label(problem_, tile_, [&](int64_t c) {
      const float factor = problem_.grad_intersection[image_ * classes_ + c];
      Sequence sequence(*this, c);
      for (int k = 0; k < count(); ++k) {
        own[k] = simd::select(is_label(c, k), sequence.at(*this, k) * factor, own[k]);
      }
    });
    for (int k = 0; k < count(); ++k) {
      const auto valid = tile_.label[k] >= 0;
      const f32x16 of_label = own[k] * tile_.inverse[k];
      tile_.through[k] = simd::keep_where(valid, tile_.through[k] - tile_.dice[k] * scale_of_terms(k) - of_label);
      tile_.dice[k] = simd::keep_where(valid, of_label - tile_.target[k]);
    }
  }
};

}  // namespace upsample_cross_entropy

// The arithmetic of one block of 16 cells in one or two output rows: see README.md for the formulas.
//
// Along a cell the upsampled logits are linear, so their exponentials form a geometric sequence: two exponentials serve
// up to eight pixels. The normaliser of a pixel is the interpolation of the cell ends' largest logits: it is no smaller
// than any logit of the pixel. Where logits lie so far below it that this could lose bits (or are infinite or NaN), the
// block is computed "directly": every pixel's own maximum, one exponential per pixel and class.
#pragma once

#include "band_labels.h"
#include "block_rows_base.h"

namespace upsample_cross_entropy {

// steps: pixels per lane of the geometric path; 0 stands for the direct path, which takes the number from the block.
// rows: output rows computed together; two where exponentials grow from row to row (row_growth.h), else one. Vectors of
// pixels have the numbers row * steps + k.
template <int steps, int rows, Task task>
class BlockRows : BlockRowsBase {
 public:
  BlockRows(const Problem& problem, Workspace& work, const Block& block, int64_t image, int64_t row)
      : BlockRowsBase(problem, work, block, image, row, rows) {}
  using BlockRowsBase::loss;

  void run() {
    if constexpr (direct) {
      read_cells();
      find_maximum();
    } else if (rows > 1 || work_.growth.active) {
      read_corners();
    } else {
      if (!read_cells()) return run_directly();
      exponentiate();
    }
    sum_exponentials();
    if constexpr (!direct && rows == 1) {
      if (!work_.growth.active && has_nan()) return run_directly();
    }
    scale_pixels();
    if constexpr (task != Task::kStatisticsGradient) cross_entropy();
    if constexpr (task == Task::kStatistics) statistics();
    if (classes_ == 1) return;  // the probability is 1: exactly no gradient
    if constexpr (task == Task::kGradient) gradient();
    if constexpr (task == Task::kStatisticsGradient) statistics_gradient();
    if (wants_gradient(task) && problem_.label_smoothing > 0) subtract_smoothing<rows>();
  }

 private:
  static constexpr bool direct = steps == 0;
  static constexpr int room = direct ? kMostSteps : steps;  // of a row's pixels
  static constexpr int pixels = rows * room;
  static_assert(rows == 1 || !direct);

  FASTSEG_INLINE int count() const { return direct ? block_.steps : steps; }  // of a row's pixels

  void run_directly() {
    BlockRows<0, 1, task> row(problem_, work_, block_, image_, row_);
    row.run();
    loss_ = row.loss();
  }

  // From the logits at the ends of the cells to the exponential of the first pixel and the ratio to the next.
  void exponentiate() {
    const f32x16 slope_of_norm = highest_[0].right - highest_[0].left, first_fraction = fraction(0);
    for (int64_t c = 0; c < classes_; ++c) {
      const Ends logits = load_ends(c);
      const f32x16 slope = logits.right - logits.left - slope_of_norm;
      simd::store(ends(c), simd::exp_in_range(logits.left - highest_[0].left + slope * first_fraction));
      if constexpr (steps > 1) simd::store(ends(c) + kLanes, simd::exp_in_range(slope * problem_.plan.step));
    }
  }

  // The exponentials of one class in one row, pixel after pixel.
  struct Sequence {
    f32x16 first, second;  // direct: logits at the ends; else: exponential of the first pixel, and ratio to the next
    f32x16 exponential;

    FASTSEG_INLINE Sequence(const BlockRows& all, int64_t c, int row)
        : first(simd::load(all.ends(c))), second(simd::load(all.ends(c) + kLanes)) {
      if (row > 0) {
        const float* factors = all.work_.growth_factors.get() + c * 2 * kLanes;
        first *= simd::load(factors);
        second *= simd::load(factors + kLanes);
      }
      exponential = first;
    }
    // Call for k = 0, 1, 2, ...
    FASTSEG_INLINE f32x16 at(const BlockRows& all, int k) {
      if constexpr (direct) {  // 0 where no pixel counts, whatever the logits hold
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

  // Dice: where e_k^2 (or, not squared, e_k) is needed and forms a geometric sequence that stays within float.
  FASTSEG_INLINE bool has_terms() const { return !direct && (squares_fit_ || !problem_.squared); }
  struct Terms {
    f32x16 first, ratio;

    FASTSEG_INLINE Terms(const BlockRows& all, const Sequence& sequence)
        : first(sequence.first), ratio(sequence.second) {
      if (!all.problem_.squared) return;
      first *= first;
      ratio *= ratio;
    }
  };

  void sum_exponentials() {
    if constexpr (task == Task::kStatisticsGradient) {
      for (int row = 0; row < rows; ++row) sum_with_dice(row);
      return;
    }
    f32x16 sum[pixels];
    FASTSEG_UNROLL for (int i = 0; i < pixels; ++i) sum[i] = f32x16{};
    for (int64_t c = 0; c < classes_; ++c) {
      for (int row = 0; row < rows; ++row) {
        Sequence sequence(*this, c, row);
        for (int k = 0; k < count(); ++k) sum[row * room + k] += sequence.at(*this, k);
      }
    }
    FASTSEG_UNROLL for (int i = 0; i < pixels; ++i) tile_.sum[i] = sum[i];
  }

  // The sums of one row and, for the Dice gradient, dice = sum_c h_c e_c (or h_c e_c^2).
  void sum_with_dice(int row) {
    f32x16 sum[room], dice[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) sum[k] = dice[k] = f32x16{};
    for (int64_t c = 0; c < classes_; ++c) {
      const float factor = problem_.grad_prediction[image_ * classes_ + c];
      Sequence sequence(*this, c, row);
      if (has_terms()) {
        Terms terms(*this, sequence);
        terms.first *= factor;
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
        dice[k] += (problem_.squared ? exponential * exponential : exponential) * factor;
      }
    }
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) {
      tile_.sum[row * room + k] = sum[k];
      tile_.dice[row * room + k] = dice[k];
    }
  }

  // The factors that make exponentials into probabilities or gradients, 0 where the label is ignored.
  void scale_pixels() {
    for (int i = 0; i < rows * count(); ++i) {
      const f32x16 inverse = simd::keep_where(tile_.label[i] >= 0, 1.0f / tile_.sum[i]);
      tile_.inverse[i] = task == Task::kGradient ? tile_.through[i] * inverse : inverse;
    }
  }

  // The loss, and the label's part of its gradient.
  void cross_entropy() {
    const bool by_pixel = direct || problem_.losses || problem_.label_smoothing > 0;
    if (by_pixel) {
      add_pixel_losses<direct>();
    } else {
      loss_ += sum_weighted_logarithms<pixels>();
    }
    if (by_pixel && task != Task::kGradient) return;
    if constexpr (!direct) {
      if (counts_by_band(problem_, work_)) return count_band_labels<steps, rows>(problem_, work_, row_);
    }
    const bool counts = !direct && problem_.plain();
    for_each_class(problem_, tile_.classes, [&](int64_t c) {
      Ends gradient[rows];
      for (int row = 0; row < rows; ++row) {
        const Ends target = counts ? count_label(c, row) : sum_over_label(c, row, tile_.target);
        gradient[row] = {-target.left, -target.right};
        if (by_pixel) continue;
        const Ends logits = between(c, row);  // they are linear in the fraction: no pixel's own is needed
        loss_ += (logits.left - highest_[row].left) * gradient[row].left +
                 (logits.right - highest_[row].right) * gradient[row].right;
      }
      if (task == Task::kGradient && classes_ > 1) accumulate(c, gradient);
    });
  }

  // Sums of values over a row's pixels labelled c, shared out between the ends of the cells.
  FASTSEG_INLINE Ends sum_over_label(int64_t c, int row, const f32x16 (&values)[kMostPixels]) const {
    f32x16 whole{}, right{};
    for (int k = 0; k < count(); ++k) {
      const f32x16 value = simd::keep_where(is_label(c, row * room + k), values[row * room + k]);
      whole += value;
      right += value * fraction(k);
    }
    return {whole - right, right};
  }

  // sum_over_label() where every pixel has the same target. The fraction of pixel k is that of pixel 0 and k steps.
  FASTSEG_INLINE Ends count_label(int64_t c, int row) const {
    const i32x16 counted = count_pixels<room>(tile_, row, c);
    const f32x16 number = simd::convert<f32x16>(counted >> kPixelBits);
    const f32x16 steps_on = simd::convert<f32x16>(counted & (kPixel - 1));
    const f32x16 right = number * fraction(0) + steps_on * problem_.plan.step;
    return {(number - right) * problem_.grad_numerator, right * problem_.grad_numerator};
  }

  // Cross-entropy: p through.
  void gradient() {
    f32x16 inverse[pixels], inverse_right[pixels];
    FASTSEG_UNROLL for (int i = 0; i < pixels; ++i) {
      inverse[i] = tile_.inverse[i];
      inverse_right[i] = tile_.inverse[i] * fraction(i % room);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      Ends ends[rows];
      for (int row = 0; row < rows; ++row) {
        f32x16 whole{}, right{};
        Sequence sequence(*this, c, row);
        if constexpr (direct) {
          for (int k = 0; k < count(); ++k) {
            const f32x16 exponential = sequence.at(*this, k);
            whole += exponential * inverse[k];
            right += exponential * inverse_right[k];
          }
        } else {
          whole = sequence.first * polynomial(inverse + row * room, sequence.second);
          right = sequence.first * polynomial(inverse_right + row * room, sequence.second);
        }
        ends[row] = {whole - right, right};
      }
      accumulate(c, ends);
    }
  }

  // Dice: sums of p^2 or p, and of the label's p and pixels.
  void statistics() {
    f32x16 scale[pixels];
    FASTSEG_UNROLL for (int i = 0; i < pixels; ++i) scale[i] = scale_of_terms(i);
    for (int64_t c = 0; c < classes_; ++c) {
      f32x16 prediction{};
      for (int row = 0; row < rows; ++row) {
        Sequence sequence(*this, c, row);
        if (has_terms()) {
          const Terms terms(*this, sequence);
          prediction += terms.first * polynomial(scale + row * room, terms.ratio);
          continue;
        }
        for (int k = 0; k < count(); ++k) {
          const f32x16 probability = sequence.at(*this, k) * tile_.inverse[row * room + k];
          prediction += problem_.squared ? probability * probability : probability;
        }
      }
      add(work_.prediction + c * kLanes, prediction);
    }
    const bool counted = !direct && counts_by_band(problem_, work_);
    for_each_class(problem_, tile_.classes, [&](int64_t c) {
      f32x16 intersection{};
      for (int row = 0; row < rows; ++row) intersection += sum_of_label_probabilities(c, row);
      add(work_.intersection + c * kLanes, intersection);
      if (counted) return;
      f32x16 truth{};
      for (int i = 0; i < rows * count(); ++i) truth += simd::keep_where(is_label(c, i), simd::splat(1.0f));
      add(work_.truth + c * kLanes, truth);
    });
  }

  FASTSEG_INLINE f32x16 sum_of_label_probabilities(int64_t c, int row) const {
    Sequence sequence(*this, c, row);
    f32x16 inverse[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) {
      inverse[k] = simd::keep_where(is_label(c, row * room + k), tile_.inverse[row * room + k]);
    }
    if constexpr (!direct) return sequence.first * polynomial(inverse, sequence.second);
    f32x16 sum{};
    for (int k = 0; k < count(); ++k) sum += sequence.at(*this, k) * inverse[k];
    return sum;
  }

  // p (h_c p + common) + [c = label] own, without the inner p when not squared.
  void statistics_gradient() {
    add_label_gradient();
    for (int row = 0; row < rows; ++row) add_statistics_gradient(row);
  }

  // The first term, of one row: the coefficients of two would not fit the registers.
  [[gnu::noinline]] void add_statistics_gradient(int row) {
    f32x16 scale[room], scale_right[room], common[room], common_right[room];
    FASTSEG_UNROLL for (int k = 0; k < room; ++k) {
      const int i = row * room + k;
      scale[k] = scale_of_terms(i);
      scale_right[k] = scale[k] * fraction(k);
      common[k] = tile_.common[i] * tile_.inverse[i];
      common_right[k] = common[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      const float factor = problem_.grad_prediction[image_ * classes_ + c];
      f32x16 whole{}, right{};
      Sequence sequence(*this, c, row);
      if (has_terms()) {
        const f32x16 inner = problem_.squared ? sequence.first * factor : simd::splat(factor);
        const f32x16 ratio = Terms(*this, sequence).ratio;
        whole = sequence.first * (inner * polynomial(scale, ratio) + polynomial(common, sequence.second));
        right = sequence.first * (inner * polynomial(scale_right, ratio) + polynomial(common_right, sequence.second));
      } else {
        for (int k = 0; k < count(); ++k) {
          const f32x16 probability = sequence.at(*this, k) * tile_.inverse[row * room + k];
          const f32x16 inner = problem_.squared ? probability * factor : simd::splat(factor);
          const f32x16 value = probability * (inner + tile_.common[row * room + k]);
          whole += value;
          right += value * fraction(k);
        }
      }
      accumulate(c, row, {whole - right, right});
    }
  }

  // What makes e^2 (or e) of vector i a p^2 (or p).
  FASTSEG_INLINE f32x16 scale_of_terms(int i) const {
    return problem_.squared ? tile_.inverse[i] * tile_.inverse[i] : tile_.inverse[i];
  }

  // The second term, and common = smoothing - sum_c h_c p_c^2 (or h_c p_c) - own, where own = dI p - target of the
  // label. (As own enters both terms in the same rounding, all cancels where p = 1.)
  [[gnu::noinline]] void add_label_gradient() {
    f32x16 own[pixels];
    FASTSEG_UNROLL for (int i = 0; i < pixels; ++i) own[i] = f32x16{};
    for_each_class(problem_, tile_.classes, [&](int64_t c) FASTSEG_ALWAYS_INLINE {
      const float factor = problem_.grad_intersection[image_ * classes_ + c];
      Ends ends[rows];
      for (int row = 0; row < rows; ++row) {
        f32x16 whole{}, right{};
        Sequence sequence(*this, c, row);
        if constexpr (!direct) sequence.exponential *= factor;
        for (int k = 0; k < count(); ++k) {
          const int i = row * room + k;
          const f32x16 exponential = direct ? sequence.at(*this, k) * factor : sequence.at(*this, k);
          const f32x16 value = exponential * tile_.inverse[i] - tile_.target[i];
          const auto labelled = is_label(c, i);
          own[i] = simd::select(labelled, value, own[i]);
          whole = simd::select(labelled, whole + value, whole);
          right = simd::select(labelled, right + value * fraction(k), right);
        }
        ends[row] = {whole - right, right};
      }
      accumulate(c, ends);
    });
    for (int i = 0; i < rows * count(); ++i) {
      const f32x16 smoothing = tile_.through[i] - tile_.target[i];
      const f32x16 common = smoothing - tile_.dice[i] * scale_of_terms(i) - own[i];
      tile_.common[i] = simd::keep_where(tile_.label[i] >= 0, common);
    }
  }
};

}  // namespace upsample_cross_entropy

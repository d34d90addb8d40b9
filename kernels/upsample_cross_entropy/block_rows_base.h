// What the arithmetic of a block's rows does not owe to the number of steps or to the task: see block_rows.h.
#pragma once

#include "row_growth.h"
#include "tile_labels.h"

namespace upsample_cross_entropy {

constexpr float kLargestSpread = 60.0f;

class BlockRowsBase {
 public:
  BlockRowsBase(const Problem& problem, Workspace& work, const Block& block, int64_t image, int64_t row, int rows)
      : problem_(problem), work_(work), tile_(work.tile), block_(block), image_(image), row_(row), rows_(rows),
        lower_(problem.vertical.fraction.data() + row), classes_(problem.classes) {}

  f32x16 loss() const { return loss_; }

 protected:
  // Of one class, at the left and right ends of the cells.
  struct Ends {
    f32x16 left, right;
  };

  FASTSEG_INLINE f32x16 fraction(int k) const { return simd::load(block_.fraction[k]); }
  FASTSEG_INLINE float* ends(int64_t c) const { return work_.logits.get() + c * 2 * kLanes; }
  FASTSEG_INLINE Ends load_ends(int64_t c) const { return {simd::load(ends(c)), simd::load(ends(c) + kLanes)}; }

  FASTSEG_INLINE float upper(int row) const { return 1.0f - lower_[row]; }

  // Logits of class c at the ends of the cells in the `row`th of the rows.
  template <Cells cells>
  FASTSEG_INLINE Ends between(int64_t c, int row) const {
    const float* above = work_.upper + c * work_.stride;
    const float* below = work_.lower + c * work_.stride;
    return {read_row<cells>(block_, above) * upper(row) + read_row<cells>(block_, below) * lower_[row],
            read_row<cells>(block_, above + 1) * upper(row) + read_row<cells>(block_, below + 1) * lower_[row]};
  }
  FASTSEG_INLINE Ends between(int64_t c, int row) const {
    return with_cells(block_, [&](auto cells) FASTSEG_ALWAYS_INLINE { return between<cells>(c, row); });
  }

  // Reads the ends of the cells, of a single row. False if their logits cannot take the geometric path.
  template <Cells cells>
  [[gnu::noinline]] bool read_cells() {
    f32x16 highest_left = simd::splat(-INFINITY), highest_right = highest_left;
    f32x16 lowest_left = simd::splat(INFINITY), lowest_right = lowest_left;
    for (int64_t c = 0; c < classes_; ++c) {
      const auto [left, right] = between<cells>(c, 0);
      simd::store(ends(c), left);
      simd::store(ends(c) + kLanes, right);
      highest_left = simd::maximum(highest_left, left);
      highest_right = simd::maximum(highest_right, right);
      lowest_left = simd::minimum(lowest_left, left);
      lowest_right = simd::minimum(lowest_right, right);
    }
    highest_[0] = Ends{highest_left, highest_right};
    if (problem_.label_smoothing > 0) sum_weighted_logits();
    const auto within = [&](float spread) {
      const f32x16 most = simd::splat(spread);
      return simd::mask_bits((highest_left - lowest_left <= most) & (highest_right - lowest_right <= most)) == 0xffff;
    };
    squares_fit_ = within(kLargestGrowth);
    return squares_fit_ || within(kLargestSpread);
  }
  bool read_cells() {
    return with_cells(block_, [&](auto cells) { return read_cells<cells>(); });
  }

  // Label smoothing: sum_c w_c logit_c at both ends.
  [[gnu::noinline]] void sum_weighted_logits() {
    weighted_[0] = Ends{};
    for (int64_t c = 0; c < classes_; ++c) {
      const Ends logits = load_ends(c);
      weighted_[0].left += logits.left * problem_.weight_of(c);
      weighted_[0].right += logits.right * problem_.weight_of(c);
    }
  }

  // Where the exponentials grow from row to row only the normalisers remain to be interpolated.
  FASTSEG_INLINE void read_corners() {
    const auto at_ends = [&](const f32x16(&corners)[4], int row) FASTSEG_ALWAYS_INLINE {
      return Ends{corners[0] * upper(row) + corners[2] * lower_[row],
                  corners[1] * upper(row) + corners[3] * lower_[row]};
    };
    for (int row = 0; row < rows_; ++row) {
      highest_[row] = at_ends(work_.growth.highest, row);
      if (problem_.label_smoothing > 0) weighted_[row] = at_ends(work_.growth.weighted, row);
    }
  }

  FASTSEG_INLINE f32x16 interpolate(Ends logits, int k) const {
    return logits.left * (1.0f - fraction(k)) + logits.right * fraction(k);
  }

  // The direct path's normaliser: the pixel's largest logit. It takes single rows.
  [[gnu::noinline]] void find_maximum() {
    for (int k = 0; k < block_.steps; ++k) tile_.norm[k] = simd::splat(-INFINITY);
    for (int64_t c = 0; c < classes_; ++c) {
      const Ends logits = load_ends(c);
      for (int k = 0; k < block_.steps; ++k) {
        tile_.norm[k] = simd::maximum(tile_.norm[k], interpolate(logits, k));
      }
    }
  }

  [[gnu::noinline]] bool has_nan() const {
    f32x16 total{};
    for (int i = 0; i < rows_ * block_.steps; ++i) total += tile_.sum[i];
    return simd::any(total != total);
  }

  FASTSEG_INLINE i32x16 is_label(int64_t c, int i) const { return tile_.label[i] == static_cast<int32_t>(c); }

  // --- the cross-entropy's value ---

  // sum_i through_i ln(sum_i) of the geometric path, whose sums are normal numbers.
  template <int count>
  [[gnu::noinline]] f32x16 sum_weighted_logarithms() const {
    f32x16 total{};
    if (!problem_.plain()) {
      for (int i = 0; i < count; ++i) total += tile_.through[i] * simd::log_finite(tile_.sum[i]);
      return total;
    }
    // All `through` are alike: one logarithm, that of a product, whose exponents are summed apart lest it overflow.
    constexpr uint32_t kOne = 0x3f800000u, kMantissa = 0x007fffffu;
    f32x16 product = simd::splat(1.0f);
    u32x16 exponents{};
    for (int i = 0; i < count; ++i) {
      const f32x16 sum = simd::select(tile_.label[i] >= 0, tile_.sum[i], simd::splat(1.0f));
      const u32x16 bits = simd::bit_cast<u32x16>(sum);
      exponents += bits >> 23;
      product *= simd::bit_cast<f32x16>((bits & kMantissa) | kOne);
    }
    const i32x16 powers = simd::bit_cast<i32x16>(exponents) - count * static_cast<int32_t>(kOne >> 23);
    return (simd::log_finite(product) + simd::convert<f32x16>(powers) * 0.693147181f) * problem_.grad_numerator;
  }

  // The logits of the labels less their normalisers, for a loss of every pixel.
  template <bool direct>
  [[gnu::noinline]] void pick_label_logits(f32x16 (&picked)[kMostPixels]) const {
    for (f32x16& lanes : picked) lanes = f32x16{};
    for_each_class(problem_, tile_.classes, [&](int64_t c) {
      for (int row = 0; row < rows_; ++row) {
        Ends logits = between(c, row);
        if constexpr (!direct) logits = {logits.left - highest_[row].left, logits.right - highest_[row].right};
        for (int k = 0; k < block_.steps; ++k) {
          const int i = row * block_.steps + k;
          f32x16 shifted = interpolate(logits, k);
          if constexpr (direct) shifted -= tile_.norm[i];
          picked[i] = simd::select(is_label(c, i), shifted, picked[i]);
        }
      }
    });
  }

  template <bool direct>
  [[gnu::noinline]] void add_pixel_losses() {
    f32x16 picked[kMostPixels];
    pick_label_logits<direct>(picked);
    for (int i = 0; i < rows_ * block_.steps; ++i) {
      const int row = i / block_.steps, k = i % block_.steps;
      f32x16 loss = tile_.through[i] * simd::log(tile_.sum[i]) - tile_.target[i] * picked[i];
      if (problem_.label_smoothing > 0) {
        const f32x16 norm = direct ? tile_.norm[i] : interpolate(highest_[row], k);
        loss -= tile_.smooth[i] * (interpolate(weighted_[row], k) - norm * problem_.class_weight_sum);
      }
      loss = simd::keep_where(tile_.label[i] >= 0, loss);
      if (problem_.losses) write_losses(loss, row, k);
      loss_ += loss;
    }
  }

  void write_losses(f32x16 lanes, int row, int k) const {
    alignas(64) float loss[kLanes];
    simd::store(loss, lanes);
    float* to = problem_.losses + (image_ * problem_.height() + row_ + row) * problem_.width();
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t pixel = block_.pixel[k][lane];
      if (pixel < problem_.width()) to[pixel] = loss[lane];
    }
  }

  // --- gradients ---

  FASTSEG_INLINE static void add(float* to, f32x16 lanes) { simd::store(to, simd::load(to) + lanes); }

  // Adds gradients of the ends of the cells: all, and the lower source row's share.
  FASTSEG_INLINE void accumulate(int64_t c, Ends all, Ends lower) {
    float* to = work_.accumulators.get() + c * 4 * kLanes;
    add(to, all.left);
    add(to + kLanes, all.right);
    add(to + 2 * kLanes, lower.left);
    add(to + 3 * kLanes, lower.right);
  }
  FASTSEG_INLINE void accumulate(int64_t c, int row, Ends gradient) {
    accumulate(c, gradient, Ends{gradient.left * lower_[row], gradient.right * lower_[row]});
  }
  template <int rows>
  FASTSEG_INLINE void accumulate(int64_t c, const Ends (&gradient)[rows]) {
    Ends all = gradient[0], lower{gradient[0].left * lower_[0], gradient[0].right * lower_[0]};
    for (int row = 1; row < rows; ++row) {
      all.left += gradient[row].left;
      all.right += gradient[row].right;
      lower.left += gradient[row].left * lower_[row];
      lower.right += gradient[row].right * lower_[row];
    }
    accumulate(c, all, lower);
  }

  // Label smoothing: w_c smooth of every class.
  template <int rows>
  [[gnu::noinline]] void subtract_smoothing() {
    Ends smooth[rows];
    for (int row = 0; row < rows; ++row) {
      f32x16 whole{}, right{};
      for (int k = 0; k < block_.steps; ++k) {
        whole += tile_.smooth[row * block_.steps + k];
        right += tile_.smooth[row * block_.steps + k] * fraction(k);
      }
      smooth[row] = {right - whole, -right};
    }
    for (int64_t c = 0; c < classes_; ++c) {
      Ends gradient[rows];
      for (int row = 0; row < rows; ++row) {
        gradient[row] = {smooth[row].left * problem_.weight_of(c), smooth[row].right * problem_.weight_of(c)};
      }
      accumulate(c, gradient);
    }
  }

  const Problem& problem_;
  Workspace& work_;
  PixelTile& tile_;
  const Block& block_;
  int64_t image_, row_;  // the first of `rows_` output rows
  int rows_;
  const float* lower_;  // [rows_] weight of the lower source row
  int64_t classes_;
  Ends highest_[kMostRows], weighted_[kMostRows];  // of the logits, and with label smoothing sum_c w_c logit_c
  f32x16 loss_{};
  bool squares_fit_ = true;  // whether e_k^2 / e_0^2 is a number
};

}  // namespace upsample_cross_entropy

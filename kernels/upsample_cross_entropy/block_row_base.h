// What the arithmetic of a block's row does not owe to the number of steps or to the task: see block_row.h.
#pragma once

#include "row_growth.h"
#include "tile_labels.h"

namespace upsample_cross_entropy {

constexpr float kLargestSpread = 60.0f;

class BlockRowBase {
 public:
  BlockRowBase(const Problem& problem, Workspace& work, const Block& block, float fraction, int64_t image, int64_t row)
      : problem_(problem), work_(work), tile_(work.tile), block_(block), image_(image), row_(row),
        lower_(fraction), upper_(1.0f - fraction), classes_(problem.classes) {}

  f32x16 loss() const { return loss_; }

 protected:
  // Of one class, at the left and right ends of the cells.
  struct Ends {
    f32x16 left, right;
  };

  FASTSEG_INLINE f32x16 fraction(int k) const { return simd::load(block_.fraction[k]); }
  FASTSEG_INLINE float* ends(int64_t c) const { return work_.logits.get() + c * 2 * kLanes; }
  FASTSEG_INLINE Ends load_ends(int64_t c) const { return {simd::load(ends(c)), simd::load(ends(c) + kLanes)}; }

  template <Cells cells>
  FASTSEG_INLINE Ends between(int64_t c) const {
    const float* above = work_.upper + c * work_.stride;
    const float* below = work_.lower + c * work_.stride;
    return {read_row<cells>(block_, above) * upper_ + read_row<cells>(block_, below) * lower_,
            read_row<cells>(block_, above + 1) * upper_ + read_row<cells>(block_, below + 1) * lower_};
  }
  FASTSEG_INLINE Ends between(int64_t c) const {
    return with_cells(block_, [&](auto cells) FASTSEG_ALWAYS_INLINE { return between<cells>(c); });
  }

  // Reads the ends of the cells. False if their logits cannot take the geometric path.
  template <Cells cells>
  [[gnu::noinline]] bool read_cells() {
    f32x16 highest_left = simd::splat(-INFINITY), highest_right = highest_left;
    f32x16 lowest_left = simd::splat(INFINITY), lowest_right = lowest_left;
    for (int64_t c = 0; c < classes_; ++c) {
      const auto [left, right] = between<cells>(c);
      simd::store(ends(c), left);
      simd::store(ends(c) + kLanes, right);
      highest_left = simd::maximum(highest_left, left);
      highest_right = simd::maximum(highest_right, right);
      lowest_left = simd::minimum(lowest_left, left);
      lowest_right = simd::minimum(lowest_right, right);
    }
    highest_ = Ends{highest_left, highest_right};
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
    weighted_ = Ends{};
    for (int64_t c = 0; c < classes_; ++c) {
      const Ends logits = load_ends(c);
      weighted_.left += logits.left * problem_.weight_of(c);
      weighted_.right += logits.right * problem_.weight_of(c);
    }
  }

  // Where the exponentials grow from row to row only the normalisers remain to be interpolated.
  FASTSEG_INLINE void read_corners() {
    const auto at_ends = [&](const f32x16(&corners)[4]) FASTSEG_ALWAYS_INLINE {
      return Ends{corners[0] * upper_ + corners[2] * lower_, corners[1] * upper_ + corners[3] * lower_};
    };
    highest_ = at_ends(work_.growth.highest);
    if (problem_.label_smoothing > 0) weighted_ = at_ends(work_.growth.weighted);
  }

  FASTSEG_INLINE f32x16 interpolate(Ends logits, int k) const {
    return logits.left * (1.0f - fraction(k)) + logits.right * fraction(k);
  }

  // The direct path's normaliser: the pixel's largest logit.
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
    for (int k = 0; k < block_.steps; ++k) total += tile_.sum[k];
    return simd::any(total != total);
  }

  FASTSEG_INLINE i32x16 is_label(int64_t c, int k) const { return tile_.label[k] == static_cast<int32_t>(c); }

  // --- the cross-entropy's value ---

  // sum_k through_k ln(sum_k) of the geometric path, whose sums are normal numbers.
  template <int count>
  [[gnu::noinline]] f32x16 sum_weighted_logarithms() const {
    f32x16 total{};
    if (!problem_.plain()) {
      for (int k = 0; k < count; ++k) total += tile_.through[k] * simd::log_finite(tile_.sum[k]);
      return total;
    }
    // All `through` are alike: one logarithm, that of a product, whose exponents are summed apart lest it overflow.
    constexpr uint32_t kOne = 0x3f800000u, kMantissa = 0x007fffffu;
    f32x16 product = simd::splat(1.0f);
    u32x16 exponents{};
    for (int k = 0; k < count; ++k) {
      const f32x16 sum = simd::select(tile_.label[k] >= 0, tile_.sum[k], simd::splat(1.0f));
      const u32x16 bits = simd::bit_cast<u32x16>(sum);
      exponents += bits >> 23;
      product *= simd::bit_cast<f32x16>((bits & kMantissa) | kOne);
    }
    const i32x16 powers = simd::bit_cast<i32x16>(exponents) - count * static_cast<int32_t>(kOne >> 23);
    return (simd::log_finite(product) + simd::convert<f32x16>(powers) * 0.693147181f) * problem_.grad_numerator;
  }

  // The logits of the labels less their normalisers, for a loss of every pixel.
  template <bool direct>
  [[gnu::noinline]] void pick_label_logits(f32x16 (&picked)[kMostSteps]) const {
    for (f32x16& lanes : picked) lanes = f32x16{};
    for_each_label(problem_, tile_, [&](int64_t c) {
      Ends logits = between(c);
      if constexpr (!direct) logits = {logits.left - highest_.left, logits.right - highest_.right};
      for (int k = 0; k < block_.steps; ++k) {
        f32x16 shifted = interpolate(logits, k);
        if constexpr (direct) shifted -= tile_.norm[k];
        picked[k] = simd::select(is_label(c, k), shifted, picked[k]);
      }
    });
  }

  template <bool direct>
  [[gnu::noinline]] void add_pixel_losses() {
    f32x16 picked[kMostSteps];
    pick_label_logits<direct>(picked);
    for (int k = 0; k < block_.steps; ++k) {
      f32x16 loss = tile_.through[k] * simd::log(tile_.sum[k]) - tile_.target[k] * picked[k];
      if (problem_.label_smoothing > 0) {
        const f32x16 norm = direct ? tile_.norm[k] : interpolate(highest_, k);
        loss -= tile_.smooth[k] * (interpolate(weighted_, k) - norm * problem_.class_weight_sum);
      }
      loss = simd::keep_where(tile_.label[k] >= 0, loss);
      if (problem_.losses) write_losses(loss, k);
      loss_ += loss;
    }
  }

  void write_losses(f32x16 lanes, int k) {
    alignas(64) float loss[kLanes];
    simd::store(loss, lanes);
    float* to = problem_.losses + (image_ * problem_.height() + row_) * problem_.width();
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t pixel = block_.pixel[k][lane];
      if (pixel < problem_.width()) to[pixel] = loss[lane];
    }
  }

  // --- gradients ---

  FASTSEG_INLINE static void add(float* to, f32x16 lanes) { simd::store(to, simd::load(to) + lanes); }

  // Adds gradients of the ends of the cells.
  FASTSEG_INLINE void accumulate(int64_t c, f32x16 left, f32x16 right) {
    float* to = work_.accumulators.get() + c * 4 * kLanes;
    add(to, left);
    add(to + kLanes, right);
    add(to + 2 * kLanes, left * lower_);
    add(to + 3 * kLanes, right * lower_);
  }

  // Label smoothing: w_c smooth of every class.
  [[gnu::noinline]] void subtract_smoothing() {
    f32x16 whole{}, right{};
    for (int k = 0; k < block_.steps; ++k) {
      whole += tile_.smooth[k];
      right += tile_.smooth[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      const float weight = problem_.weight_of(c);
      accumulate(c, (right - whole) * weight, right * -weight);
    }
  }

  const Problem& problem_;
  Workspace& work_;
  PixelTile& tile_;
  const Block& block_;
  int64_t image_, row_;
  float lower_, upper_;
  int64_t classes_;
  Ends highest_, weighted_;  // of the logits, and with label smoothing sum_c w_c logit_c
  f32x16 loss_{};
  bool squares_fit_ = true;  // whether e_k^2 / e_0^2 is a number
};

}  // namespace upsample_cross_entropy

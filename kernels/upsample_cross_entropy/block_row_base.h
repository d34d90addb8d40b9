// The labels and weights of a block's pixels in one output row, and the arithmetic that depends neither on the number
// of steps nor on the task: see block_row.h.
#pragma once

#include "problem.h"

namespace upsample_cross_entropy {

namespace detail {

// Loads the weights of pixels k of the lanes in output row y.
inline void load_pixel_weights(const Problem& problem, const Block& block, int64_t image, int64_t y, int k,
                               PixelTile& tile) {
  const int64_t row = image * problem.height() + y;
  const float smoothing = problem.label_smoothing;
  const int64_t* strides = problem.grad_losses_strides;
  alignas(64) float target_lanes[kLanes]{}, smooth_lanes[kLanes]{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t label = tile.label[k][lane];
    if (label < 0) continue;
    const int64_t x = block.pixel[k][lane];
    float weight = problem.grad_numerator;
    if (problem.pixel_weight) weight *= problem.pixel_weight[row * problem.width() + x];
    if (problem.grad_losses) weight *= problem.grad_losses[image * strides[0] + y * strides[1] + x * strides[2]];
    target_lanes[lane] = weight * (1.0f - smoothing) * problem.weight_of(label);
    smooth_lanes[lane] = weight * smoothing / static_cast<float>(problem.classes);
  }
  const f32x16 target = simd::load(target_lanes), smooth = simd::load(smooth_lanes);
  tile.target[k] = target;
  tile.smooth[k] = smooth;
  tile.through[k] = target + smooth * problem.class_weight_sum;
}

}  // namespace detail

// Loads labels and weights of the block in output row y, whose labels are given.
template <int steps>
[[gnu::noinline]] void load_tile(const Problem& problem, const Block& block, int64_t image, int64_t y,
                                 const int32_t* labels, PixelTile& tile) {
  const i32x16 none = simd::splat(int32_t(-1)), width = simd::splat(static_cast<int32_t>(problem.width()));
  const u32x16 one = simd::bit_cast<u32x16>(simd::splat(int32_t(1)));
  const bool several_words = problem.classes > 32;
  u32x16 residues{}, words{};
  for (int k = 0; k < steps; ++k) {
    alignas(64) int32_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = labels[block.pixel[0][lane] + k];
    i32x16 label = simd::load(lanes);
    if (!block.full) label = simd::select(simd::load(block.pixel[k]) < width, label, none);
    const auto counted = label >= 0;
    const u32x16 bits = simd::bit_cast<u32x16>(label);
    residues |= simd::keep_where(counted, simd::shift_left(one, bits & 31u));
    if (several_words) words |= simd::keep_where(counted, simd::shift_left(one, (bits >> 5) & 31u));
    tile.label[k] = label;
  }
  const uint32_t modulo_32 = simd::reduce_or(residues);
  tile.classes = {modulo_32, several_words ? simd::reduce_or(words) : modulo_32 != 0};
  if (tile.classes.empty() || problem.basic()) return;
  for (int k = 0; k < steps; ++k) detail::load_pixel_weights(problem, block, image, y, k, tile);
}

// Calls fn(c) for every class of the set.
template <typename Function>
FASTSEG_INLINE void for_each_class(const Problem& problem, const ClassSet& set, const Function& fn) {
  for (int64_t first = 0; first < problem.classes; first += 32) {
    if (!(set.words >> (first / 32 % 32) & 1)) continue;
    for (uint32_t bits = set.modulo_32; bits; bits &= bits - 1) {
      const int64_t c = first + __builtin_ctz(bits);
      if (c < problem.classes) fn(c);
    }
  }
}

constexpr float kLargestSpread = 60.0f;   // of a pixel's logits
constexpr float kLargestSquared = 42.0f;  // the same if squares of the exponentials must be normal numbers

class BlockRowBase {
 public:
  BlockRowBase(const Problem& problem, Workspace& work, const Block& block, int64_t image, int64_t row)
      : problem_(problem), work_(work), tile_(work.tile), block_(block), image_(image), row_(row),
        lower_(problem.vertical.fraction[row]), classes_(problem.classes) {}

  f32x16 loss() const { return loss_; }

 protected:
  // Values of one class at the left and right ends of the cells.
  struct Ends {
    f32x16 left, right;
  };

  FASTSEG_INLINE f32x16 fraction(int k) const { return simd::load(block_.fraction[k]); }
  FASTSEG_INLINE float* ends(int64_t c) const { return work_.logits.get() + c * 2 * kLanes; }
  FASTSEG_INLINE Ends load_ends(int64_t c) const { return {simd::load(ends(c)), simd::load(ends(c) + kLanes)}; }

  // Logits of class c at the ends of the cells.
  FASTSEG_INLINE Ends between(int64_t c) const {
    const float* above = work_.upper + c * work_.stride + block_.cell;
    const float* below = work_.lower + c * work_.stride + block_.cell;
    const float upper = 1.0f - lower_;
    return {simd::load(above) * upper + simd::load(below) * lower_,
            simd::load(above + 1) * upper + simd::load(below + 1) * lower_};
  }

  // Reads the ends of the cells. False if their logits (or the squares of their exponentials, if needed) do not allow
  // the geometric path.
  [[gnu::noinline]] bool read_cells(bool squared) {
    f32x16 highest_left = simd::splat(-INFINITY), highest_right = highest_left;
    f32x16 lowest_left = simd::splat(INFINITY), lowest_right = lowest_left;
    for (int64_t c = 0; c < classes_; ++c) {
      const auto [left, right] = between(c);
      simd::store(ends(c), left);
      simd::store(ends(c) + kLanes, right);
      highest_left = simd::maximum(highest_left, left);
      highest_right = simd::maximum(highest_right, right);
      lowest_left = simd::minimum(lowest_left, left);
      lowest_right = simd::minimum(lowest_right, right);
    }
    highest_ = Ends{highest_left, highest_right};
    if (problem_.label_smoothing > 0) sum_weighted_logits();
    const f32x16 most = simd::splat(squared ? kLargestSquared : kLargestSpread);
    return simd::mask_bits((highest_left - lowest_left <= most) & (highest_right - lowest_right <= most)) == 0xffff;
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

  // The logits of the labels minus their normalisers, for losses of every pixel.
  template <bool direct>
  [[gnu::noinline]] void pick_label_logits(f32x16 (&picked)[kMostSteps]) const {
    for (f32x16& lanes : picked) lanes = f32x16{};
    for_each_class(problem_, tile_.classes, [&](int64_t c) {
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

  void write_losses(f32x16 lanes, int k) const {
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

  // Adds gradients of the ends of the cells, and the lower source row's share of them.
  FASTSEG_INLINE void accumulate(int64_t c, Ends gradient) {
    float* to = work_.accumulators.get() + c * 4 * kLanes;
    add(to, gradient.left);
    add(to + kLanes, gradient.right);
    add(to + 2 * kLanes, gradient.left * lower_);
    add(to + 3 * kLanes, gradient.right * lower_);
  }
  // Label smoothing: w_c smooth of every class.
  [[gnu::noinline]] void subtract_smoothing() {
    f32x16 total{}, right{};
    for (int k = 0; k < block_.steps; ++k) {
      total += tile_.smooth[k];
      right += tile_.smooth[k] * fraction(k);
    }
    for (int64_t c = 0; c < classes_; ++c) {
      accumulate(c, {(right - total) * problem_.weight_of(c), -right * problem_.weight_of(c)});
    }
  }

  const Problem& problem_;
  Workspace& work_;
  PixelTile& tile_;
  const Block& block_;
  int64_t image_, row_;
  float lower_;  // weight of the lower source row
  int64_t classes_;
  Ends highest_, weighted_;  // of the logits, and with label smoothing sum_c w_c logit_c
  f32x16 loss_{};
};

}  // namespace upsample_cross_entropy

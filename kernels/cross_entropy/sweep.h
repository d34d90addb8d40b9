// One sweep over the logits: loss, gradient or both, for cross entropy and focal loss. Formulas in README.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cross_entropy/problem.h"
#include "cross_entropy/two_classes.h"
#include "fastseg/tile_softmax.h"

namespace fastseg::cross_entropy {

// Sweeps a slice of the tiles: loss, gradient or both.
template <typename scalar_t>
class Sweep {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  using mask_t = simd::mask<accumulate_t>;

  explicit Sweep(const Problem<scalar_t>& problem)
      : problem_(problem), access_(problem.logits, problem.gradient, problem.classes), tile_(access_.tile()),
        numbers_(tile_), smoothing_(static_cast<accumulate_t>(problem.options.label_smoothing / problem.classes)),
        weight_total_(0) {
    for (int64_t c = 0; c < problem.classes; ++c) weight_total_ += weight_of(c);
  }

  Sums run(int64_t begin, int64_t end) {
    for_each_tile(begin, end, problem_.pixels, tile_, [&](int64_t image, int64_t first, int count) {
      const int64_t position = image * problem_.pixels + first;
      sums_.labels_in_range &= load_labels(problem_.labels, position, count, tile_, numbers_.labels);
      load_weights(position, count);
      access_.visit(image, first, count, [&](const Tile<scalar_t>& tile) { one_tile(tile, position, count); });
    });
    sums_.loss = simd::reduce_add(loss_);
    sums_.denominator = simd::reduce_add(denominator_);
    return sums_;
  }

 private:
  accumulate_t weight_of(int64_t c) const { return problem_.class_weight ? problem_.class_weight[c] : accumulate_t(1); }

  void load_weights(int64_t position, int count) {
    const vector_t one = simd::splat(accumulate_t(1));
    for (int i = 0; i < tile_; i += kLanes) {
      const mask_t valid = is_valid(i);
      vector_t weight = one, pixel_weight = one;
      if (problem_.class_weight) {
        alignas(64) accumulate_t of_label[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
          of_label[lane] = problem_.class_weight[std::max(numbers_.labels[i + lane], 0)];
        weight = simd::load(of_label);
      }
      if (problem_.pixel_weight && i < count) {
        const int here = std::min(kLanes, count - i);
        pixel_weight = simd::load_partial(problem_.pixel_weight + position + i, here, accumulate_t(0));
      }
      simd::store(numbers_.target_weight + i, simd::keep_where(valid, weight));
      simd::store(numbers_.pixel_weight + i, simd::keep_where(valid, pixel_weight));
    }
  }

  FASTSEG_INLINE mask_t is_valid(int i) const {
    return simd::convert<mask_t>(~(simd::load(numbers_.labels + i) >> 31));  // true where the label is not negative
  }

  void one_tile(const Tile<scalar_t>& tile, int64_t position, int count) {
    tile_maximum(tile, problem_.classes, tile_, numbers_.maximum);
    load_target_logits();
    exponentials(tile);
    pixel_formulas(position, count);
    if (problem_.gradient.data) write_gradient(tile);
  }

  void load_target_logits() {
    const accumulate_t* rows = access_.rows();
    const int64_t stride = access_.row_stride();
    for (int i = 0; i < tile_; i += kLanes) {
      const int32_t common = common_label(numbers_.labels + i);
      numbers_.common_labels[i / kLanes] = common;
      if (common >= 0) {
        simd::store(numbers_.target_logit + i, simd::load(rows + common * stride + i));
        continue;
      }
      for (int k = i; k < i + kLanes; ++k)
        numbers_.target_logit[k] = rows[std::max(numbers_.labels[k], 0) * stride + k];
    }
  }

  void exponentials(const Tile<scalar_t>& tile) {
    accumulate_t* class_sum = numbers_.class_sum;
    const auto softmax = [&](const auto& each) {
      tile_softmax(tile, problem_.classes, tile_, numbers_.maximum, numbers_.sum, each);
    };
    if (problem_.options.gamma == 0 && problem_.options.label_smoothing == 0) {
      softmax([](int64_t, int, vector_t, vector_t) {});
      return;
    }
    if (problem_.options.gamma != 0) {
      hide_label_logits();
      softmax([](int64_t, int, vector_t, vector_t) {});
      complete_sums();
    } else {
      std::fill(class_sum, class_sum + tile_, accumulate_t(0));
      softmax([&](int64_t c, int i, vector_t shifted, vector_t) {
        simd::store(class_sum + i, simd::load(class_sum + i) + weight_of(c) * shifted);
      });
    }
  }

  // Focal loss needs the exact sum of the other exponentials: with the label's logit set to minus infinity the softmax
  // gives that sum, and 0 as the label's exponential, which is its gradient before label_excess.
  void hide_label_logits() const {
    const vector_t lowest = simd::splat(-std::numeric_limits<accumulate_t>::infinity());
    at_labels([&](accumulate_t* run, int i) { simd::store(run, simd::select(is_valid(i), lowest, simd::load(run))); },
              [&](accumulate_t* logit, int) { *logit = lowest[0]; });
  }
  void complete_sums() const {
    for (int i = 0; i < tile_; i += kLanes) {
      const vector_t others = simd::load(numbers_.sum + i);
      const vector_t shifted = simd::load(numbers_.target_logit + i) - simd::load(numbers_.maximum + i);
      simd::store(numbers_.class_sum + i, others);
      simd::store(numbers_.sum + i, others + simd::exp_nonpositive(shifted));
    }
  }

  // From the sums of every pixel to its loss and to the three factors of its gradient.
  void pixel_formulas(int64_t position, int count) {
    const bool focal = problem_.options.gamma != 0;
    const accumulate_t smoothed = static_cast<accumulate_t>(1 - problem_.options.label_smoothing);
    // At most 16 numbers a lane, so fp32 suffices within a tile; across tiles the sums are double.
    vector_t loss_sum{}, denominator_sum{};
    for (int i = 0; i < tile_; i += kLanes) {
      const mask_t valid = is_valid(i);
      const vector_t weight = simd::load(numbers_.target_weight + i);
      const vector_t pixel_weight = simd::load(numbers_.pixel_weight + i);
      const vector_t sum = simd::load(numbers_.sum + i);
      const vector_t label_gap = simd::load(numbers_.maximum + i) - simd::load(numbers_.target_logit + i);
      const vector_t log_sum = simd::log_finite(sum);
      vector_t loss = weight * (label_gap + log_sum);
      vector_t slope = weight;      // gradient = slope p_c - label_slope [c = label] - ...
      vector_t label_excess = sum;  // sum * label_slope / slope
      if (focal) {
        const vector_t factor = focal_factors(i, label_gap, loss);
        loss *= weight;
        slope *= factor;
        label_excess = simd::load(numbers_.class_sum + i);
      } else if (smoothing_ != 0) {
        const vector_t uniform = weight_total_ * log_sum - simd::load(numbers_.class_sum + i);
        loss = smoothed * loss + smoothing_ * uniform;
        slope = smoothed * weight + smoothing_ * weight_total_;
        label_excess = simd::select(slope == vector_t{}, sum, sum * (smoothed * weight / slope));
      }
      loss = simd::keep_where(valid, loss * pixel_weight);
      const vector_t share = problem_.options.reduction == kMean ? weight * pixel_weight : pixel_weight;
      loss_sum += loss;
      denominator_sum += share;
      if (problem_.pixel_loss && i < count) {
        simd::store_partial(problem_.pixel_loss + position + i, loss, std::min(kLanes, count - i));
      }
      if (problem_.gradient.data) {
        // Scale 0 still gives NaN for NaN logits of an ignored pixel, as in stock PyTorch: see clear_ignored().
        const vector_t scale = simd::keep_where(valid, gradient_scale(position, i, count) * pixel_weight);
        simd::store(numbers_.scale + i, simd::keep_where(valid, scale * slope) / sum);
        simd::store(numbers_.label_excess + i, label_excess);
        simd::store(numbers_.smoothing_scale + i, scale * smoothing_);
      }
    }
    loss_ += simd::convert<simd::f64x16>(loss_sum);
    denominator_ += simd::convert<simd::f64x16>(denominator_sum);
  }

  vector_t gradient_scale(int64_t position, int i, int count) const {
    const accumulate_t scale = static_cast<accumulate_t>(problem_.scale);
    if (!problem_.grad_output) return simd::splat(scale);
    if (problem_.options.reduction != kNone) return simd::splat(scale * problem_.grad_output[0]);
    if (i >= count) return vector_t{};
    return simd::load_partial(problem_.grad_output + position + i, std::min(kLanes, count - i), accumulate_t(0));
  }

  // loss = (1 - p)^gamma (-log p) of the label's probability p, and the factor f of dloss/dlogit_c = f (p_c -
  // [c = label]). 1 - p is the sum of the other exponentials over the whole sum, so it keeps its digits as p
  // goes to 1.
  vector_t focal_factors(int i, vector_t label_gap, vector_t& loss) const {
    const accumulate_t gamma = static_cast<accumulate_t>(problem_.options.gamma);
    const vector_t one = simd::splat(accumulate_t(1));
    const vector_t others = simd::load(numbers_.class_sum + i);
    const vector_t target = simd::exp_nonpositive(-label_gap);
    const vector_t sum = target + others;
    const vector_t miss = others / sum;
    const vector_t p = target / sum;
    // log(1 + others) where the label's logit is the largest (target = 1), without losing a small `others` in the sum
    const vector_t one_plus = one + others;
    const vector_t log1p = simd::select(one_plus == one, others, simd::log(one_plus) * others / (one_plus - one));
    const vector_t surprise = simd::select(target == one, log1p, label_gap + simd::log(sum));
    const vector_t modulation = power(miss, gamma);
    const vector_t ratio = simd::select(miss > vector_t{}, p * surprise / miss, one);  // -> 1 as p -> 1
    loss = modulation * surprise;
    return modulation * (one + gamma * simd::select(p == vector_t{}, vector_t{}, ratio));
  }

  static vector_t power(vector_t base, accumulate_t exponent) {
    if (exponent == 1) return base;
    if (exponent == 2) return base * base;
    return simd::exp(exponent * simd::log(base));
  }

  // Scale and rows 0 at the ignored pixels of a tile, whatever their logits are.
  void clear_ignored() const {
    for (int i = 0; i < tile_; i += kLanes) {
      const mask_t valid = is_valid(i);
      if (!simd::any(~valid)) continue;
      simd::store(numbers_.scale + i, simd::keep_where(valid, simd::load(numbers_.scale + i)));
      for (int64_t c = 0; c < problem_.classes; ++c) {
        accumulate_t* row = access_.rows() + c * access_.row_stride() + i;
        simd::store(row, simd::keep_where(valid, simd::load(row)));
      }
    }
  }

  void write_gradient(const Tile<scalar_t>& tile) const {
    if (problem_.options.inert_ignored) clear_ignored();
    // The label's term is subtracted first.
    const accumulate_t* excess = numbers_.label_excess;
    at_labels([&](accumulate_t* run,
                  int i) { simd::store(run, simd::load(run) - simd::keep_where(is_valid(i), simd::load(excess + i))); },
              [&](accumulate_t* exponential, int pixel) { *exponential -= excess[pixel]; });
    smoothing_ == 0 ? write_rows<false>(tile) : write_rows<true>(tile);
  }

  // Calls run(place in the rows, i) for 16 pixels that all have one label or are ignored, else one(place, pixel) for
  // each that is not ignored.
  template <typename Run, typename One>
  FASTSEG_INLINE void at_labels(const Run& run, const One& one) const {
    accumulate_t* const rows = access_.rows();
    const int64_t stride = access_.row_stride();
    for (int i = 0; i < tile_; i += kLanes) {
      const int32_t common = numbers_.common_labels[i / kLanes];
      if (common >= 0) {
        run(rows + common * stride + i, i);
        continue;
      }
      for (int k = i; k < i + kLanes; ++k) {
        if (numbers_.labels[k] >= 0) one(rows + numbers_.labels[k] * stride + k, k);
      }
    }
  }

  template <bool smoothed>
  void write_rows(Tile<scalar_t> tile) const {
    const accumulate_t* rows = access_.rows();
    const int64_t classes = problem_.classes, stride = access_.row_stride();
    for_each_group(tile_, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
      vector_t scale[vectors];
      for (int v = 0; v < vectors; ++v) scale[v] = simd::load(numbers_.scale + first + v * kLanes);
      for (int64_t c = 0; c < classes; ++c) {
        vector_t gradient[vectors];
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          gradient[v] = simd::load(rows + c * stride + i);
          gradient[v] *= scale[v];
          if (smoothed) gradient[v] -= weight_of(c) * simd::load(numbers_.smoothing_scale + i);
        }
        store_group(tile, c, first, gradient);
      }
    });
  }

  const Problem<scalar_t>& problem_;
  TileAccess<scalar_t> access_;
  int tile_;
  PixelNumbers<accumulate_t> numbers_;
  accumulate_t smoothing_;               // label_smoothing / C
  accumulate_t weight_total_;            // sum of the class weights
  simd::f64x16 loss_{}, denominator_{};  // sums so far
  Sums sums_;
};

// Runs the whole problem. Throws IndexError for a label out of range.
template <typename scalar_t>
Sums sweep(const Problem<scalar_t>& problem) {
  constexpr int64_t kFewestElements = 1 << 14;  // with fewer a second thread costs more than it saves
  const int tile = tile_pixels(problem.classes);
  const int64_t tiles = problem.images * ceil_divide(problem.pixels, tile);
  const int64_t smallest = ceil_divide(kFewestElements, problem.classes * tile);
  return sum_of_slices(problem, tiles, smallest, [&](int64_t begin, int64_t end) {
    if (is_of_two_classes(problem)) return TwoClassSweep<scalar_t>(problem).run(begin, end);
    return Sweep<scalar_t>(problem).run(begin, end);
  });
}

// The denominator of a mean, which the sweep needs: from the labels, and the weights if there are any.
template <typename scalar_t>
double count_denominator(const Problem<scalar_t>& problem) {
  constexpr int64_t kChunk = 1 << 12;
  const int64_t count = problem.images * problem.pixels;
  const bool weighted = problem.class_weight && problem.options.reduction == kMean;
  const auto chunks = [&](int64_t begin, int64_t end) {
    Scratch<int32_t> labels(kChunk);
    Sums sums;
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, count); first += kChunk) {
      const int here = static_cast<int>(std::min(kChunk, count - first));
      if (!weighted && !problem.pixel_weight) {
        int64_t valid = 0;
        sums.labels_in_range &= count_labels(problem.labels, first, here, valid);
        sums.denominator += static_cast<double>(valid);
        continue;
      }
      sums.labels_in_range &= load_labels(problem.labels, first, here, here, labels.get());
      for (int i = 0; i < here; ++i) {
        const int32_t label = labels.get()[i];
        if (label < 0) continue;
        sums.denominator += double(weighted ? problem.class_weight[label] : 1) *
                            double(problem.pixel_weight ? problem.pixel_weight[first + i] : 1);
      }
    }
    return sums;
  };
  return sum_of_slices(problem, ceil_divide(count, kChunk), 4, chunks).denominator;
}

}  // namespace fastseg::cross_entropy

// Backward of the softmax statistics: one pass from their gradients to that of the logits.
#pragma once

#include <vector>

#include "cross_entropy_dice/softmax_tile.h"

namespace softmax_statistics {

// The gradients of the statistics, in the accumulator type.
template <typename accumulate_t>
struct Coefficients {
  std::vector<accumulate_t> intersection;  // [N, C]
  std::vector<accumulate_t> prediction;    // [N, C]; twice the gradient for the squared form
  accumulate_t numerator;
};

template <typename scalar_t>
class Backward {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  // The type of the numbers per pixel: the dot product cancels against the largest terms of the gradient, which does
  // not matter for gradients of a half type.
  using Wide = std::conditional_t<sizeof(scalar_t) == 2, simd::f32x16, simd::f64x16>;

  Backward(const Problem<scalar_t>& problem, PixelView<scalar_t> gradient,
           const Coefficients<accumulate_t>& coefficients)
      : problem_(problem), coefficients_(coefficients), softmax_(problem, gradient), at_label_(softmax_.pixels),
        target_(softmax_.pixels), present_(problem.classes),
        smoothing_(static_cast<accumulate_t>(problem.label_smoothing / problem.classes)),
        weight_total_(problem.weight_total()) {}

  bool run(int64_t begin, int64_t end) {
    bool labels_in_range = true;
    for_each_tile(begin, end, problem_.pixels, softmax_.pixels, [&](int64_t image, int64_t first, int count) {
      labels_in_range &= softmax_.load_pixels(image * problem_.pixels + first, count);
      const accumulate_t* prediction = coefficients_.prediction.data() + image * problem_.classes;
      const accumulate_t* intersection = coefficients_.intersection.data() + image * problem_.classes;
      softmax_.access.visit(image, first, count, [&](const Tile<scalar_t>& tile) {
        tile_maximum(tile, problem_.classes, softmax_.pixels, softmax_.maximum);
        if (problem_.squared) {
          differentiate<true>(tile, prediction, intersection);
        } else {
          differentiate<false>(tile, prediction, intersection);
        }
      });
    });
    return labels_in_range;
  }

 private:
  template <bool squared>
  void differentiate(const Tile<scalar_t>& tile, const accumulate_t* prediction, const accumulate_t* intersection) {
    exponentials<squared>(tile, prediction);
    softmax_.invert_sums();
    pixel_factors<squared>(intersection);
    if (smoothing_ != 0) {
      write_gradient<squared, true>(tile, prediction);
    } else {
      write_gradient<squared, false>(tile, prediction);
    }
  }

  // rows = e^(z - maximum), sum = their sum, class_sum = sum_c dP_c e_c^2 (or e_c), from one read of the tile.
  template <bool squared>
  void exponentials(Tile<scalar_t> tile, const accumulate_t* prediction) {
    accumulate_t* rows = softmax_.rows;
    const int64_t classes = problem_.classes, stride = softmax_.stride;
    for_each_group(softmax_.pixels, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
      vector_t largest[vectors], total[vectors], dot[vectors];
      for (int v = 0; v < vectors; ++v) {
        largest[v] = simd::load(softmax_.maximum + first + v * kLanes);
        total[v] = dot[v] = vector_t{};
      }
      for (int64_t c = 0; c < classes; ++c) {
        const accumulate_t factor = prediction[c];
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          tile.prefetch(c, i);
          accumulate_t* at = rows + c * stride + i;
          const vector_t e = simd::exp_of_logits<scalar_t>(simd::load(at) - largest[v]);
          total[v] += e;
          dot[v] += squared ? factor * e * e : factor * e;
          simd::store(at, e);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        simd::store(softmax_.sum + first + v * kLanes, total[v]);
        simd::store(softmax_.class_sum + first + v * kLanes, dot[v]);
      }
    });
  }

  // gradient_c = p_c (dP_c p_c + base)                              c not the label
  //            = p_c (dP_c p_c + at_label) + target (p_c - 1)         c the label
  // and, with smoothing, + smoothing (p_c W - w_c). Sets base (class_sum), at_label, target and smoothing (label_gap).
  template <bool squared>
  void pixel_factors(const accumulate_t* intersection) {
    const accumulate_t unsmoothed = static_cast<accumulate_t>(1 - problem_.label_smoothing);
    for (int i = 0; i < softmax_.pixels; i += kLanes) {
      const Wide rough = wide(simd::load(softmax_.inverse + i));
      const Wide inverse = rough * (2 - wide(simd::load(softmax_.sum + i)) * rough);  // one Newton step
      const Wide at_label = wide(softmax_.of_label(
          i, [&](int64_t c) { return simd::splat(intersection[c]); }, [&](int64_t c, int) { return intersection[c]; }));
      Wide dot = wide(simd::load(softmax_.class_sum + i)) * inverse;
      if (squared) dot *= inverse;
      dot += wide(softmax_.exponential_of_label(i)) * inverse * at_label;
      // (no 0 * inf when nothing is valid and the mean divides by 0)
      const vector_t share = simd::load(softmax_.share + i);
      const vector_t scale = simd::keep_where(softmax_.is_valid(i), share * coefficients_.numerator);
      const vector_t target = unsmoothed * simd::load(softmax_.target_weight + i) * scale;
      const vector_t base = simd::convert<vector_t>(wide(target) - dot);
      simd::store(at_label_.get() + i, simd::convert<vector_t>(at_label - dot));
      simd::store(softmax_.class_sum + i, simd::keep_where(softmax_.is_valid(i), base));
      simd::store(target_.get() + i, target);
      simd::store(softmax_.label_gap + i, smoothing_ * scale);
    }
  }

  FASTSEG_INLINE static Wide wide(vector_t lanes) { return simd::convert<Wide>(lanes); }

  template <bool squared, bool smoothed>
  void write_gradient(Tile<scalar_t> tile, const accumulate_t* prediction) {
    const accumulate_t* rows = softmax_.rows;
    const int64_t classes = problem_.classes, stride = softmax_.stride;
    mark_present_classes();
    for_each_group(softmax_.pixels, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
      vector_t inverse[vectors], base[vectors];
      for (int v = 0; v < vectors; ++v) {
        inverse[v] = simd::load(softmax_.inverse + first + v * kLanes);
        base[v] = simd::load(softmax_.class_sum + first + v * kLanes);
      }
      for (int64_t c = 0; c < classes; ++c) {
        const accumulate_t weight = smoothed ? problem_.weight_of(c) : accumulate_t(0);
        vector_t gradients[vectors];
        const auto row = [&](auto is_present) FASTSEG_ALWAYS_INLINE {
          for (int v = 0; v < vectors; ++v) {
            const int i = first + v * kLanes;
            const vector_t p = simd::load(rows + c * stride + i) * inverse[v];
            const vector_t of_p = squared ? prediction[c] * p : simd::splat(prediction[c]);
            vector_t gradient;
            if constexpr (is_present) {
              const auto is_label = softmax_.is_label(c, i);
              const vector_t target = simd::keep_where(is_label, simd::load(target_.get() + i));
              const vector_t shared = simd::select(is_label, simd::load(at_label_.get() + i), base[v]);
              gradient = p * (of_p + shared) + target * (p - 1);
            } else {
              gradient = p * (of_p + base[v]);
            }
            if (smoothed) gradient += simd::load(softmax_.label_gap + i) * (p * weight_total_ - weight);
            gradients[v] = gradient;
          }
        };
        if (present_[c]) {
          row(std::true_type());
        } else {
          row(std::false_type());
        }
        store_group(tile, c, first, gradients);
      }
    });
  }

  // Most classes have no pixel in a tile: their rows need not be compared with the labels.
  void mark_present_classes() {
    std::fill(present_.begin(), present_.end(), char(0));
    for (int i = 0; i < softmax_.pixels; i += kLanes) {
      const int32_t common = softmax_.common_label[i / kLanes];
      if (common >= 0) {
        present_[common] = 1;
        continue;
      }
      for (int lane = i; lane < i + kLanes; ++lane) {
        if (softmax_.labels[lane] >= 0) present_[softmax_.labels[lane]] = 1;
      }
    }
  }

  const Problem<scalar_t>& problem_;
  const Coefficients<accumulate_t>& coefficients_;
  SoftmaxTile<scalar_t> softmax_;
  Scratch<accumulate_t> at_label_;  // [T] dI of the label, less the dot product
  Scratch<accumulate_t> target_;    // [T] weight of the pixel's cross-entropy, 0 where ignored
  std::vector<char> present_;       // [C] whether the class is the label of a pixel of the tile
  accumulate_t smoothing_;          // label_smoothing / C
  accumulate_t weight_total_;       // W, sum of the class weights
};

}  // namespace softmax_statistics

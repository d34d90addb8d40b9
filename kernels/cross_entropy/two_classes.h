// Cross entropy of two classes, if basic(): one pass and one exponential per pixel, since the probability of the other
// class is the sigmoid of its lead, that is its logit minus the label's.
#pragma once

#include <cstdint>

#include "cross_entropy/problem.h"

namespace fastseg::cross_entropy {

template <typename scalar_t>
bool is_of_two_classes(const Problem<scalar_t>& problem) {
  return problem.classes == 2 && problem.basic();
}

// Sweeps a slice of the tiles: loss, gradient or both.
template <typename scalar_t>
class TwoClassSweep {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  using mask_t = simd::mask<accumulate_t>;

  explicit TwoClassSweep(const Problem<scalar_t>& problem)
      : problem_(problem), access_(problem.logits, problem.gradient, 2), labels_(access_.tile()) {}

  Sums run(int64_t begin, int64_t end) {
    for_each_tile(begin, end, problem_.pixels, access_.tile(), [&](int64_t image, int64_t first, int count) {
      const int64_t position = image * problem_.pixels + first;
      sums_.labels_in_range &= load_labels(problem_.labels, position, count, access_.tile(), labels_.get());
      access_.visit(image, first, count, [&](const Tile<scalar_t>& tile) { one_tile(tile); });
    });
    sums_.loss = simd::reduce_add(loss_);
    sums_.denominator = simd::reduce_add(denominator_);
    return sums_;
  }

 private:
  void one_tile(Tile<scalar_t> tile) {
    const int32_t* labels = labels_.get();  // -1: ignored
    const bool with_gradient = problem_.gradient.data;
    const vector_t one = simd::splat(accumulate_t(1)), scale = simd::splat(problem_.basic_scale());
    // Sums are at most 2, so the product of a lane's sums is small: fp32 suffices for a tile.
    vector_t leads{}, valid_pixels{}, product = one;
    for_each_group(access_.tile(), [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
      vector_t distance[vectors], slope[vectors], alarm{};
      for (int v = 0; v < vectors; ++v) {
        const int i = first + v * kLanes;
        tile.prefetch(0, i);
        tile.prefetch(1, i);
        distance[v] = tile.load(1, i) - tile.load(0, i);
        alarm += distance[v] * accumulate_t(0);  // NaN if it is infinite or NaN
      }
      if (simd::any(alarm != alarm)) {
        for (int v = 0; v < vectors; ++v) {
          distance[v] += nan_where_infinite(tile, first + v * kLanes);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        const simd::i32x16 label = simd::load(labels + first + v * kLanes);
        const mask_t valid = simd::convert<mask_t>(~(label >> 31)), second = simd::convert<mask_t>(-label >> 31);
        const vector_t lead = simd::select(second, -distance[v], distance[v]);  // of the other class
        const vector_t small = simd::exp_of_logits<scalar_t>(simd::negative(distance[v]));
        const vector_t sum = one + small;
        leads += simd::keep_where(valid, simd::maximum(vector_t{}, lead));
        product *= simd::select(valid, sum, one);
        valid_pixels += simd::keep_where(valid, one);
        const vector_t p_other = simd::select(lead < vector_t{}, small, one) / sum;
        // An ignored pixel has scale 0 and not "no gradient": NaN logits give NaN there, as in stock PyTorch.
        const vector_t other = p_other * simd::keep_where(valid, scale);
        slope[v] = simd::select(second, other, -other);
      }
      if (!with_gradient) return;
      store_group(tile, 0, first, slope);
      for (int v = 0; v < vectors; ++v) slope[v] = -slope[v];
      store_group(tile, 1, first, slope);
    });
    loss_ += simd::convert<simd::f64x16>(leads + simd::log_finite(product));
    denominator_ += simd::convert<simd::f64x16>(valid_pixels);
  }

  // NaN where the larger logit is infinite, as the softmax.
  static vector_t nan_where_infinite(const Tile<scalar_t>& tile, int i) {
    const vector_t largest = simd::maximum(tile.load(0, i), tile.load(1, i));
    return largest - largest;
  }

  const Problem<scalar_t>& problem_;
  TileAccess<scalar_t> access_;
  Scratch<int32_t> labels_;
  simd::f64x16 loss_{}, denominator_{};
  Sums sums_;
};

}  // namespace fastseg::cross_entropy

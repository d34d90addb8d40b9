// Cross entropy of two classes, plain(): one pass and one exponential per pixel, since the probability of the class
// that is not the label is the sigmoid of how far it lies ahead.
#pragma once

#include <cstdint>

#include "cross_entropy/problem.h"

namespace fastseg::cross_entropy {

template <typename scalar_t>
bool is_of_two_classes(const Problem<scalar_t>& problem) {
  return problem.classes == 2 && problem.plain();
}

// Of the labels [position, position + count). Adds to `sums` how many are not ignored.
inline LabelBits label_bits(const LabelView& labels, int64_t position, int count, Sums& sums) {
  alignas(64) int32_t values[LabelBits::kTile];  // -1: ignored
  sums.labels_in_range &= load_labels(labels, position, count, LabelBits::kTile, values);
  LabelBits bits;
  int valid = 0;
  for (int v = 0; v < LabelBits::kVectors; ++v) {
    const simd::i32x16 lanes = simd::load(values + v * kLanes);
    bits.valid[v] = static_cast<uint16_t>(~simd::mask_bits(lanes));
    bits.second[v] = static_cast<uint16_t>(simd::mask_bits(-lanes));
    valid += __builtin_popcount(bits.valid[v]);
  }
  sums.denominator += valid;
  return bits;
}

// The labels of every tile, and what a mean divides by.
template <typename scalar_t>
double read_label_bits(const Problem<scalar_t>& problem, LabelBits* bits) {
  constexpr int kTile = LabelBits::kTile;
  const int64_t per_image = ceil_divide(problem.pixels, kTile);
  return sum_of_slices(problem, problem.images * per_image, 64, [&](int64_t begin, int64_t end) {
    Sums sums;
    LabelBits* next = bits + begin;
    for_each_tile(begin, end, problem.pixels, kTile, [&](int64_t image, int64_t first, int count) {
      *next++ = label_bits(problem.labels, image * problem.pixels + first, count, sums);
    });
    return sums;
  }).denominator;
}

// Sweeps a slice of the tiles: loss, gradient or both.
template <typename scalar_t>
class TwoClassSweep {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  explicit TwoClassSweep(const Problem<scalar_t>& problem)
      : problem_(problem), access_(problem.logits, problem.gradient, 2) {}

  Sums run(int64_t begin, int64_t end) {
    const LabelBits* next = problem_.label_bits ? problem_.label_bits + begin : nullptr;
    for_each_tile(begin, end, problem_.pixels, LabelBits::kTile, [&](int64_t image, int64_t first, int count) {
      LabelBits bits;
      if (next) {
        bits = *next++;
        for (uint16_t valid : bits.valid) sums_.denominator += __builtin_popcount(valid);
      } else {
        bits = label_bits(problem_.labels, image * problem_.pixels + first, count, sums_);
      }
      access_.visit(image, first, count, [&](const Tile<scalar_t>& tile) { one_tile(tile, bits); });
    });
    sums_.loss = simd::reduce_add(loss_);
    return sums_;
  }

 private:
  void one_tile(Tile<scalar_t> tile, const LabelBits& bits) {
    const bool with_gradient = problem_.gradient.data;
    const vector_t one = simd::splat(accumulate_t(1)), scale = simd::splat(problem_.plain_scale());
    // Sums are at most 2, so the product of a lane's is small, and fp32 serves for all of a tile.
    vector_t behind{}, product = one;
    for_each_group(LabelBits::kTile, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
      vector_t distance[vectors], slope[vectors], alarm{};
      simd::LaneBits counted[vectors];
      for (int v = 0; v < vectors; ++v) {
        const int i = first + v * kLanes;
        tile.prefetch(0, i);
        tile.prefetch(1, i);
        distance[v] = tile.load(1, i) - tile.load(0, i);
        alarm += distance[v] * accumulate_t(0);  // NaN if it is infinite or NaN
        counted[v] = {bits.valid[i / kLanes]};
      }
      if (simd::any(alarm != alarm)) {
        for (int v = 0; v < vectors; ++v) {
          distance[v] += nan_where_infinite(tile, first + v * kLanes);
          counted[v].bits |= simd::mask_bits(distance[v] != distance[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        const simd::LaneBits valid{bits.valid[first / kLanes + v]}, second{bits.second[first / kLanes + v]};
        const vector_t ahead = simd::select(second, -distance[v], distance[v]);  // the class that is not the label
        const vector_t small = simd::exp_of_logits<scalar_t>(simd::negative(distance[v]));
        const vector_t sum = one + small;
        behind = simd::select(valid, behind + simd::maximum(vector_t{}, ahead), behind);
        product = simd::select(valid, product * sum, product);
        const vector_t p_other = simd::select(ahead < vector_t{}, small, one) / sum;
        const vector_t other = simd::keep_where(counted[v], p_other * scale);
        slope[v] = simd::select(second, other, -other);
      }
      if (!with_gradient) return;
      store_group(tile, 0, first, slope);
      for (int v = 0; v < vectors; ++v) slope[v] = -slope[v];
      store_group(tile, 1, first, slope);
    });
    loss_ += simd::convert<simd::f64x16>(behind + simd::log_finite(product));
  }

  // A softmax has no value where the larger logit is infinite.
  static vector_t nan_where_infinite(const Tile<scalar_t>& tile, int i) {
    const vector_t largest = simd::maximum(tile.load(0, i), tile.load(1, i));
    return largest - largest;
  }

  const Problem<scalar_t>& problem_;
  TileAccess<scalar_t> access_;
  simd::f64x16 loss_{};
  Sums sums_;
};

}  // namespace fastseg::cross_entropy

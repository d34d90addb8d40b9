// One sweep over logits and target distributions: loss, gradient to the logits, gradient to the targets, in any
// combination. Formulas in README.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cross_entropy/target_tiles.h"
#include "fastseg/tile_softmax.h"

namespace fastseg::probability_targets {

// One call, its tensors as pointers. accumulate_t is float, double for fp64.
template <typename scalar_t>
struct Problem {
  using accumulate_t = simd::accumulate<scalar_t>;
  int64_t images, classes, pixels;                                                // N, C, P
  PixelView<const scalar_t> logits;                                               // [N, C, P]
  PixelView<scalar_t> gradient;                                                   // [N, C, P] or null: not wanted
  std::function<std::unique_ptr<TargetTiles<accumulate_t>>()> make_target_tiles;  // one for each thread
  bool wants_target_gradient;
  const accumulate_t* class_weight;  // [C] or null
  const accumulate_t* pixel_weight;  // [N, P] or null
  const accumulate_t* grad_output;   // [N, P] without reduction, [1] with one; null stands for 1
  accumulate_t* pixel_loss;          // [N, P] or null
  bool reduced;
  double scale;  // of every gradient: 1 / (N P) under a mean
  double label_smoothing;
};

// Sweeps a slice of the tiles. Arrays without a comment on their size are [T], one number per pixel of the tile.
template <typename scalar_t>
class Sweep {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  explicit Sweep(const Problem<scalar_t>& problem)
      : problem_(problem), access_(problem.logits, problem.gradient, problem.classes),
        targets_(problem.make_target_tiles()), tile_(access_.tile()), block_(problem.classes <= 64 ? 8 : 32),
        stride_(access_.row_stride()), own_rows_(problem.wants_target_gradient ? problem.classes * stride_ : 0),
        exponentials_(problem.wants_target_gradient ? own_rows_.get() : access_.rows()), pixel_values_(kArrays * tile_),
        class_values_(2 * problem.classes), target_scale_(class_values_.get()),
        target_shift_(class_values_.get() + problem.classes) {
    accumulate_t* next = pixel_values_.get();
    for (accumulate_t** array : {&maximum_, &sum_, &share_, &product_, &log_sum_, &ratio_, &factor_}) {
      *array = next;
      next += tile_;
    }
    const accumulate_t kept = static_cast<accumulate_t>(1 - problem.label_smoothing);
    const accumulate_t spread = static_cast<accumulate_t>(problem.label_smoothing / problem.classes);
    for (int64_t c = 0; c < problem.classes; ++c) {
      const accumulate_t weight = problem.class_weight ? problem.class_weight[c] : accumulate_t(1);
      target_scale_[c] = kept * weight;
      target_shift_[c] = spread * weight;
    }
  }

  // The sum of the losses.
  double run(int64_t begin, int64_t end) {
    for_each_tile(begin, end, problem_.pixels, tile_, [&](int64_t image, int64_t first, int count) {
      const int64_t position = image * problem_.pixels + first;
      targets_->visit(image, first, count, [&](const TargetRows<accumulate_t>& target) {
        access_.visit(image, first, count,
                      [&](const Tile<scalar_t>& tile) { one_tile(tile, target, position, count); });
      });
    });
    return loss_sum_;
  }

 private:
  void one_tile(const Tile<scalar_t>& tile, const TargetRows<accumulate_t>& target, int64_t position, int count) {
    tile_maximum(tile, problem_.classes, tile_, maximum_);
    softmax_and_products(tile, target);
    pixel_formulas(position, count);
    if (problem_.gradient.data && target.gradient) {
      write_gradients<true, true>(tile, target);
    } else if (problem_.gradient.data) {
      write_gradients<true, false>(tile, target);
    } else if (target.gradient) {
      write_gradients<false, true>(tile, target);
    }
  }

  // w_c ((1 - s) t_c + s / C) of 16 pixels
  FASTSEG_INLINE vector_t weighted_target(const TargetRows<accumulate_t>& target, int64_t c, int i) const {
    return target.load(c, i) * target_scale_[c] + target_shift_[c];
  }

  // Exponentials and their sum, sum of the weighted targets, sum of weighted target times (logit - maximum).
  void softmax_and_products(const Tile<scalar_t>& tile, const TargetRows<accumulate_t>& target) {
    const bool keeps_exponentials = problem_.gradient.data != nullptr;
    for_each_group(tile_, [&](int first, auto vectors) {
      vector_t largest[vectors], sum[vectors], share[vectors], product[vectors];
      for (int v = 0; v < vectors; ++v) {
        largest[v] = simd::load(maximum_ + first + v * kLanes);
        sum[v] = share[v] = product[v] = vector_t{};
      }
      for (int64_t begin = 0; begin < problem_.classes; begin += block_) {
        const int64_t end = std::min(begin + block_, problem_.classes);
        vector_t block_sum[vectors], block_share[vectors], block_product[vectors];
        for (int v = 0; v < vectors; ++v) block_sum[v] = block_share[v] = block_product[v] = vector_t{};
        for (int64_t c = begin; c < end; ++c) {
          for (int v = 0; v < vectors; ++v) {
            const int i = first + v * kLanes;
            target.prefetch(c, i, tile_);
            tile.prefetch(c, i);
            const vector_t shifted = simd::load(access_.rows() + c * stride_ + i) - largest[v];
            const vector_t weighted = weighted_target(target, c, i);
            const vector_t exponential = simd::exp_of_logits<scalar_t>(shifted);
            block_sum[v] += exponential;
            block_share[v] += weighted;
            block_product[v] += weighted * shifted;
            if (keeps_exponentials) simd::store(exponentials_ + c * stride_ + i, exponential);
          }
        }
        for (int v = 0; v < vectors; ++v) {
          sum[v] += block_sum[v];
          share[v] += block_share[v];
          product[v] += block_product[v];
        }
      }
      for (int v = 0; v < vectors; ++v) {
        const int i = first + v * kLanes;
        simd::store(sum_ + i, sum[v]);
        simd::store(share_ + i, share[v]);
        simd::store(product_ + i, product[v]);
      }
    });
  }

  // From the sums of every pixel to its loss and to the factors of its gradients.
  void pixel_formulas(int64_t position, int count) {
    vector_t sum_of_losses{};  // fp32 suffices within a tile; across tiles the sum is double
    for (int i = 0; i < tile_; i += kLanes) {
      const int here = std::clamp(count - i, 0, kLanes);
      vector_t weight = simd::splat(accumulate_t(1));
      if (problem_.pixel_weight || here < kLanes) weight = per_pixel(problem_.pixel_weight, position + i, here);
      const vector_t sum = simd::load(sum_ + i);
      const vector_t share = simd::load(share_ + i);
      const vector_t log_sum = simd::log_finite(sum);
      // An infinite target of a class far below the largest has an infinite loss, not infinity times log 1.
      const vector_t common = simd::select(log_sum == vector_t{}, vector_t{}, share * log_sum);
      const vector_t loss = weight * (common - simd::load(product_ + i));
      sum_of_losses += loss;
      if (problem_.pixel_loss && here > 0) simd::store_partial(problem_.pixel_loss + position + i, loss, here);
      if (!problem_.gradient.data && !problem_.wants_target_gradient) continue;
      simd::store(log_sum_ + i, log_sum);
      simd::store(ratio_ + i, share / sum);
      simd::store(factor_ + i, weight * gradient_scale(position + i, here));
    }
    loss_sum_ += simd::reduce_add(sum_of_losses);
  }

  // `here` numbers of a [N, P] map, 1 where there is no map, 0 past the last pixel
  static vector_t per_pixel(const accumulate_t* map, int64_t position, int here) {
    alignas(64) accumulate_t lanes[kLanes] = {};
    for (int lane = 0; lane < here; ++lane) lanes[lane] = map ? map[position + lane] : accumulate_t(1);
    return simd::load(lanes);
  }

  vector_t gradient_scale(int64_t position, int here) const {
    const accumulate_t scale = static_cast<accumulate_t>(problem_.scale);
    if (!problem_.grad_output) return simd::splat(scale);
    if (problem_.reduced) return simd::splat(scale * problem_.grad_output[0]);
    return per_pixel(problem_.grad_output, position, here);
  }

  // Logits and targets may be in the scratch rows that receive their gradients: they are read before those are written.
  template <bool to_logits, bool to_target>
  void write_gradients(const Tile<scalar_t>& tile, const TargetRows<accumulate_t>& target) const {
    for_each_group(tile_, [&](int first, auto vectors) {
      vector_t ratio[vectors], factor[vectors];
      for (int v = 0; v < vectors; ++v) {
        ratio[v] = simd::load(ratio_ + first + v * kLanes);
        factor[v] = simd::load(factor_ + first + v * kLanes);
      }
      for (int64_t c = 0; c < problem_.classes; ++c) {
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          vector_t logit_gradient, target_gradient;
          if constexpr (to_logits) {
            const vector_t exponential = simd::load(exponentials_ + c * stride_ + i);
            logit_gradient = (exponential * ratio[v] - weighted_target(target, c, i)) * factor[v];
          }
          if constexpr (to_target) {
            const vector_t shifted = simd::load(access_.rows() + c * stride_ + i) - simd::load(maximum_ + i);
            target_gradient = (simd::load(log_sum_ + i) - shifted) * target_scale_[c] * factor[v];
            target.store(c, i, target_gradient);
          }
          if constexpr (to_logits) tile.store(c, i, logit_gradient);
        }
      }
    });
  }

  static constexpr int kArrays = 7;

  const Problem<scalar_t>& problem_;
  TileAccess<scalar_t> access_;
  std::unique_ptr<TargetTiles<accumulate_t>> targets_;
  int tile_;        // T
  int64_t block_;   // classes per partial sum, about the root of C: errors grow with it and with the number of blocks
  int64_t stride_;  // of the rows of exponentials
  Scratch<accumulate_t> own_rows_;
  accumulate_t* exponentials_;  // [C, T]; the logits' scratch rows if those are not needed again
  Scratch<accumulate_t> pixel_values_;
  Scratch<accumulate_t> class_values_;
  accumulate_t *target_scale_, *target_shift_;  // [C]: w_c (1 - s) and w_c s / C
  accumulate_t* maximum_;                       // largest logit
  accumulate_t* sum_;                           // of e^(logit - maximum) over the classes
  accumulate_t* share_;                         // sum of the weighted targets
  accumulate_t* product_;                       // sum of weighted target times (logit - maximum)
  accumulate_t* log_sum_;
  accumulate_t *ratio_, *factor_;  // gradient to a logit: (e_c ratio - weighted target) factor
  double loss_sum_ = 0;
};

// Runs the problem and returns the sum of the losses.
template <typename scalar_t>
double sweep(const Problem<scalar_t>& problem) {
  constexpr int64_t kFewestElements = 1 << 14;  // with fewer a second thread costs more than it saves
  const int tile = tile_pixels(problem.classes);
  const int64_t tiles = problem.images * ceil_divide(problem.pixels, tile);
  const UnevenSlices slices(tiles, ceil_divide(kFewestElements, problem.classes * tile));
  std::vector<double> partial(slices.slices());
  slices.run(
      [&](int64_t slice, int64_t begin, int64_t end) { partial[slice] = Sweep<scalar_t>(problem).run(begin, end); });
  double total = 0;
  for (double sum : partial) total += sum;
  return total;
}

}  // namespace fastseg::probability_targets

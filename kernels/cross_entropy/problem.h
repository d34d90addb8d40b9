// One call of cross entropy or focal loss as pointers and numbers, and one thread's numbers per pixel.
#pragma once

#include <cstdint>
#include <vector>

#include "fastseg/pixel_tile.h"
#include "fastseg/reduction.h"

namespace fastseg::cross_entropy {

struct Options {
  int64_t ignore_index;
  int64_t reduction;
  double label_smoothing;
  double gamma;
  bool zero_if_empty;
  bool inert_ignored;  // an ignored pixel has gradient 0 whatever it holds; else NaN for NaN, as in stock PyTorch
};

// One call, its tensors as pointers. accumulate_t is float, double for fp64.
template <typename scalar_t>
struct Problem {
  using accumulate_t = simd::accumulate<scalar_t>;
  int64_t images, classes, pixels;   // N, C, P
  PixelView<const scalar_t> logits;  // [N, C, P]
  PixelView<scalar_t> gradient;      // [N, C, P] or null: not wanted
  LabelView labels;                  // [N, P]
  const accumulate_t* class_weight;  // [C] or null
  const accumulate_t* pixel_weight;  // [N, P] or null
  const accumulate_t* grad_output;   // [N, P] without reduction, [1] with one; null stands for 1
  accumulate_t* pixel_loss;          // [N, P] or null
  double scale;                      // of every gradient: 1 / denominator under a mean
  Options options;

  // A mean or a sum without weights, smoothing or focal exponent: the usual case.
  bool basic() const {
    return !options.inert_ignored && !class_weight && !pixel_weight && options.reduction != kNone &&
           options.label_smoothing == 0 && options.gamma == 0;
  }
  // The factor of every gradient of a basic() loss, from grad_output and scale.
  accumulate_t basic_scale() const {
    return static_cast<accumulate_t>(scale) * (grad_output ? grad_output[0] : accumulate_t(1));
  }
};

struct Sums {
  double loss = 0, denominator = 0;
  bool labels_in_range = true;
};

// The sum of one(begin, end) over slices of [0, count), in their order. Throws IndexError for a label out of range.
template <typename scalar_t, typename One>
Sums sum_of_slices(const Problem<scalar_t>& problem, int64_t count, int64_t smallest, const One& one) {
  const UnevenSlices slices(count, smallest);
  std::vector<Sums> partial(slices.slices());
  slices.run([&](int64_t slice, int64_t begin, int64_t end) { partial[slice] = one(begin, end); });
  Sums total;
  for (const Sums& sums : partial) {
    total.loss += sums.loss;
    total.denominator += sums.denominator;
    total.labels_in_range &= sums.labels_in_range;
  }
  if (!total.labels_in_range) throw_bad_label(problem.labels, problem.images * problem.pixels);
  return total;
}

// Per-pixel numbers of one tile, all [T].
template <typename accumulate_t>
struct PixelNumbers {
  explicit PixelNumbers(int tile) : values(kArrays * tile), label_values(tile + tile / kLanes) {
    accumulate_t* next = values.get();
    for (accumulate_t** array : {&maximum, &sum, &target_logit, &target_weight, &pixel_weight, &class_sum, &scale,
                                 &label_excess, &smoothing_scale}) {
      *array = next;
      next += tile;
    }
    labels = label_values.get();
    common_labels = labels + tile;
  }
  static constexpr int kArrays = 9;
  Scratch<accumulate_t> values;
  Scratch<int32_t> label_values;
  int32_t* labels;              // -1: ignored
  int32_t* common_labels;       // [T / 16] the class of 16 pixels, -1 if several
  accumulate_t* maximum;        // largest logit
  accumulate_t* sum;            // of e^(logit - maximum) over the classes
  accumulate_t* target_logit;   // logit of the label
  accumulate_t* target_weight;  // class weight of the label, 0 where ignored
  accumulate_t* pixel_weight;   // pixel weight, 0 where ignored
  accumulate_t* class_sum;      // smoothing: sum of w_c (logit_c - maximum); focal: exponentials of the other classes
  // gradient = (e_c - [c = label] label_excess) scale - w_c smoothing_scale
  accumulate_t *scale, *label_excess, *smoothing_scale;
};

}  // namespace fastseg::cross_entropy

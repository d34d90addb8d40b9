// One call of cross entropy or focal loss as plain pointers, and one thread's numbers per pixel.
#pragma once

#include <cstdint>

#include "fastseg/pixel_tile.h"

namespace fastseg::cross_entropy {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2, kMeanOfCount = 3 };

struct Options {
  int64_t ignore_index;
  int64_t reduction;
  double label_smoothing;
  double gamma;
  bool zero_if_empty;
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
};

struct Sums {
  double loss = 0, denominator = 0;
  bool labels_in_range = true;
};

// Per-pixel numbers of one tile, all [T].
template <typename accumulate_t>
struct PixelNumbers {
  explicit PixelNumbers(int tile) : values(kArrays * tile), label_values(tile + tile / kLanes) {
    accumulate_t* next = values.get();
    for (accumulate_t** array : {&maximum, &sum, &target_logit, &target_weight, &pixel_weight, &extra, &scale,
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
  accumulate_t*
      extra;  // smoothing: sum of w_c (logit_c - maximum); focal: sum of the exponentials of the others
  // gradient = (e_c - [c = label] label_excess) scale - w_c smoothing_scale
  accumulate_t *scale, *label_excess, *smoothing_scale;
};

}  // namespace fastseg::cross_entropy

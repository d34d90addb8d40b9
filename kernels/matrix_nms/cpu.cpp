// The decay of scores by Matrix NMS, from the IoU of all pairs. See README.md.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "fastseg/dense.h"
#include "fastseg/parallel.h"

namespace {

using fastseg::dense_output;
using fastseg::dense_values;
using torch::stable::Tensor;

struct Problem {
  const float* iou;       // [count, count]
  const int64_t* order;   // [count]
  const int64_t* labels;  // [count] or null
  int64_t count;
  bool gaussian;
  float sigma;

  // The IoU of the masks ranked i and j; 0 if their labels differ.
  float overlap(int64_t i, int64_t j) const {
    const int64_t a = order[i], b = order[j];
    return labels != nullptr && labels[a] != labels[b] ? 0.0f : iou[a * count + b];
  }
  float covered(int64_t j) const {
    float most = 0;
    for (int64_t i = 0; i < j; ++i) most = std::max(most, overlap(i, j));
    return most;
  }
  // covered: [j], of the masks before j.
  float decay(int64_t j, const float* covered) const {
    float most = 0, least = 1;
    for (int64_t i = 0; i < j; ++i) {
      const float o = overlap(i, j), c = covered[i];
      most = std::max(most, o * o - c * c);
      if (c < 1) least = std::min(least, (1 - o) / (1 - c));
    }
    return gaussian ? std::exp(-sigma * most) : least;
  }
};

void forward(const Tensor& iou, const Tensor& order, std::optional<Tensor> labels, bool gaussian, double sigma,
             const Tensor& decay) {
  const int64_t count = order.numel();
  const Problem problem{dense_values<float>(iou, count * count, "iou"),
                        dense_values<int64_t>(order, count, "order"),
                        dense_values<int64_t>(labels, count, "labels"),
                        count,
                        gaussian,
                        static_cast<float>(sigma)};
  float* to = dense_output<float>(decay, count, "decay");
  for (int64_t i = 0; i < count; ++i) {
    FASTSEG_CHECK(problem.order[i] >= 0 && problem.order[i] < count,
                  "fastseg::_matrix_decay: order holds no index of a mask");
  }
  std::vector<float> covered(count);
  const int64_t slices = fastseg::slice_count(count, 64) == 1 ? 1 : fastseg::ceil_divide(count, 16);
  fastseg::parallel_slices(count, slices, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) covered[j] = problem.covered(j);
  });
  fastseg::parallel_slices(count, slices, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) to[j] = problem.decay(j, covered.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_matrix_decay", TORCH_BOX(&forward)); }

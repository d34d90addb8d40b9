// The decay of scores by Matrix NMS, from the IoU of all pairs. See README.md.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/check.h"
#include "fastseg/parallel.h"

namespace {

using torch::headeronly::ScalarType;
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

const int64_t* indices(const Tensor& tensor, int64_t count, const char* name) {
  FASTSEG_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long && tensor.numel() == count,
      "fastseg::_matrix_decay: ", name, " must be int64 [N] on the CPU");
  return tensor.const_data_ptr<int64_t>();
}

void forward(const Tensor& iou, const Tensor& order, std::optional<Tensor> labels, bool gaussian, double sigma,
             const Tensor& decay) {
  const int64_t count = order.numel();
  for (const Tensor& tensor : {iou, decay}) {
    FASTSEG_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float,
                  "fastseg::_matrix_decay: iou and decay must be contiguous float32 on the CPU");
  }
  FASTSEG_CHECK(iou.numel() == count * count && decay.numel() == count,
                "fastseg::_matrix_decay: iou must be [N, N], order and decay [N]");
  const Problem problem{iou.const_data_ptr<float>(),
                        indices(order, count, "order"),
                        labels ? indices(*labels, count, "labels") : nullptr,
                        count,
                        gaussian,
                        static_cast<float>(sigma)};
  for (int64_t i = 0; i < count; ++i) {
    FASTSEG_CHECK(problem.order[i] >= 0 && problem.order[i] < count,
                  "fastseg::_matrix_decay: order holds no index of a mask");
  }
  std::vector<float> covered(count);
  float* to = decay.mutable_data_ptr<float>();
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

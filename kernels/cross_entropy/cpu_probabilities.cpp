// Softmax cross entropy against probabilities on the CPU: from tensors to a sweep, and the registration.
#include <optional>

#include <torch/csrc/stable/library.h>

#include "cross_entropy/probabilities.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;
using namespace fastseg::probability_targets;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

bool has_sizes_of(const Tensor& tensor, const Tensor& like) {
  return tensor.dim() == 3 && tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1) &&
         tensor.size(2) == like.size(2);
}

void check_targets(const Tensor& input, const Tensor& target, const std::optional<Tensor>& grad_target) {
  const bool is_double = input.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(input.dim() == 3 && has_sizes_of(target, input) && target.is_cpu() && is_pixel_view(target),
                  "input and target must be [N, C, P] views on the CPU");
  STD_TORCH_CHECK(is_double == (target.scalar_type() == ScalarType::Double),
                  "input and target must both be float64, or neither of them");
  if (!grad_target) return;
  STD_TORCH_CHECK(has_sizes_of(*grad_target, target) && grad_target->scalar_type() == target.scalar_type() &&
                      grad_target->is_cpu() && is_pixel_view(*grad_target),
                  "grad_target must be like target");
  use_huge_pages(*grad_target);
}

// Writes those of loss ([N, P] without reduction, else [1]), grad_input and grad_target that are there.
void cross_entropy_probabilities(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                                 std::optional<Tensor> pixel_weight, std::optional<Tensor> grad_output,
                                 int64_t reduction, double label_smoothing, std::optional<Tensor> loss,
                                 std::optional<Tensor> grad_input, std::optional<Tensor> grad_target) {
  check_targets(input, target, grad_target);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    Problem<scalar_t> problem{};
    problem.images = input.size(0);
    problem.classes = input.size(1);
    problem.pixels = input.size(2);
    const int64_t count = problem.images * problem.pixels;
    problem.logits = pixel_view(input, input.const_data_ptr<scalar_t>());
    problem.target = target;
    problem.target_gradient = grad_target;
    problem.class_weight = dense_values<accumulate_t>(weight, problem.classes, "weight");
    problem.pixel_weight = dense_values<accumulate_t>(pixel_weight, count, "pixel_weight");
    problem.grad_output = dense_values<accumulate_t>(grad_output, reduction == kNone ? count : 1, "grad_output");
    problem.reduced = reduction != kNone;
    problem.scale = reduction == kMean ? 1.0 / count : 1.0;
    problem.label_smoothing = label_smoothing;
    if (grad_input) {
      STD_TORCH_CHECK(has_sizes_of(*grad_input, input) && grad_input->scalar_type() == input.scalar_type(),
                      "grad_input must be like input");
      use_huge_pages(*grad_input);
      problem.gradient = pixel_view(*grad_input, grad_input->template mutable_data_ptr<scalar_t>());
    }
    accumulate_t* losses = nullptr;
    if (loss) losses = dense_output<accumulate_t>(*loss, problem.reduced ? 1 : count, "loss");
    if (!problem.reduced) problem.pixel_loss = losses;
    const double sum = sweep(problem);
    if (losses && problem.reduced) *losses = static_cast<accumulate_t>(sum * problem.scale);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_cross_entropy_probabilities", TORCH_BOX(&cross_entropy_probabilities));
}

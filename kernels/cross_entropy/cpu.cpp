// Softmax cross entropy and focal loss on the CPU: from tensors to a sweep, and the registration.
#include <optional>

#include <torch/csrc/stable/library.h>

#include "cross_entropy/sweep.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;
using namespace fastseg::cross_entropy;

template <typename scalar_t>
Problem<scalar_t> problem_of(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& pixel_weight, const Options& options) {
  using accumulate_t = simd::accumulate<scalar_t>;
  Problem<scalar_t> problem{};
  problem.logits = pixel_view(input, input.const_data_ptr<scalar_t>());
  problem.images = input.size(0);
  problem.classes = input.size(1);
  problem.pixels = input.size(2);
  const int64_t count = problem.images * problem.pixels;
  problem.labels = label_view(target, count, problem.classes, options.ignore_index);
  problem.class_weight = dense_values<accumulate_t>(weight, problem.classes, "weight");
  problem.pixel_weight = dense_values<accumulate_t>(pixel_weight, count, "pixel_weight");
  problem.scale = 1;
  problem.options = options;
  if (problem.classes == 1)
    problem.options.label_smoothing = 0;  // nothing to spread; the gradient stays exactly 0
  return problem;
}

template <typename scalar_t>
void want_gradient(Problem<scalar_t>& problem, const Tensor& grad_input) {
  STD_TORCH_CHECK(grad_input.dim() == 3 && grad_input.scalar_type() == scalar_type_of<scalar_t>() &&
                      grad_input.size(0) == problem.images && grad_input.size(1) == problem.classes &&
                      grad_input.size(2) == problem.pixels,
                  "grad_input must be like input");
  use_huge_pages(grad_input);
  problem.gradient = pixel_view(grad_input, grad_input.mutable_data_ptr<scalar_t>());
}

bool takes_mean(const Options& options) {
  return options.reduction == kMean || options.reduction == kMeanOfCount;
}

double mean_scale(const Options& options, double denominator) {
  return options.zero_if_empty && denominator == 0 ? 0.0 : 1 / denominator;
}

// loss: [N, P] without reduction, else [1]; denominator: [1].
template <typename scalar_t>
void finish(const Problem<scalar_t>& problem, const Sums& sums, const Tensor& loss,
            const Tensor& denominator) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const Options& options = problem.options;
  *dense_output<accumulate_t>(denominator, 1, "denominator") = static_cast<accumulate_t>(sums.denominator);
  if (options.reduction == kNone) return;
  double value = sums.loss;
  if (takes_mean(options))
    value = options.zero_if_empty && sums.denominator == 0 ? 0.0 : value / sums.denominator;
  *dense_output<accumulate_t>(loss, 1, "loss") = static_cast<accumulate_t>(value);
}

void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
             std::optional<Tensor> pixel_weight, int64_t ignore_index, int64_t reduction,
             double label_smoothing, double gamma, bool zero_if_empty, const Tensor& loss,
             const Tensor& denominator) {
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    if (reduction == kNone)
      problem.pixel_loss = dense_output<accumulate_t>(loss, problem.images * problem.pixels, "loss");
    finish(problem, sweep(problem), loss, denominator);
  });
}

void with_gradient(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                   std::optional<Tensor> pixel_weight, int64_t ignore_index, int64_t reduction,
                   double label_smoothing, double gamma, bool zero_if_empty, const Tensor& loss,
                   const Tensor& denominator, const Tensor& grad_input) {
  STD_TORCH_CHECK(reduction != kNone, "the gradient in the forward needs a reduction");
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    want_gradient(problem, grad_input);
    if (takes_mean(options)) problem.scale = mean_scale(options, count_denominator(problem));
    finish(problem, sweep(problem), loss, denominator);
  });
}

void backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
              std::optional<Tensor> pixel_weight, const Tensor& grad_output, const Tensor& denominator,
              int64_t ignore_index, int64_t reduction, double label_smoothing, double gamma,
              bool zero_if_empty, const Tensor& grad_input) {
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    want_gradient(problem, grad_input);
    const int64_t count = reduction == kNone ? problem.images * problem.pixels : 1;
    problem.grad_output = dense_values<accumulate_t>(grad_output, count, "grad_output");
    if (takes_mean(options))
      problem.scale = mean_scale(options, *dense_values<accumulate_t>(denominator, 1, "denominator"));
    sweep(problem);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("_cross_entropy_with_gradient", TORCH_BOX(&with_gradient));
  m.impl("_cross_entropy_backward", TORCH_BOX(&backward));
}

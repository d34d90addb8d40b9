// Softmax cross entropy and focal loss on the CPU: entry points that turn tensors into a sweep, and their registration.
#include <optional>

#include <torch/csrc/stable/library.h>

#include "cross_entropy/sweep.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;
using namespace fastseg::cross_entropy;

// The arguments of the loss and of its gradient.
struct Arguments {
  const Tensor &input, &target;                       // [N, C, ...], [N, ...]
  const std::optional<Tensor>&weight, &pixel_weight;  // [C], [N, ...]
  Options options;
};

// For the input and, unless it is null, the gradient.
PixelWalk walk_of(const Tensor& input, const Tensor* gradient) {
  if (!gradient) return PixelWalk({input}, {});
  FASTSEG_CHECK(gradient->scalar_type() == input.scalar_type(), "the gradient must be like input");
  use_huge_pages(*gradient);
  return PixelWalk({input}, {*gradient});
}

template <typename scalar_t>
Problem<scalar_t> problem_of(const Arguments& arguments, const PixelWalk& walk, bool gradient) {
  using accumulate_t = simd::accumulate<scalar_t>;
  Problem<scalar_t> problem{};
  problem.logits = walk.input<scalar_t>(0);
  if (gradient) problem.gradient = walk.output<scalar_t>(1);
  problem.images = walk.images;
  problem.classes = walk.classes;
  problem.pixels = walk.pixels;
  const int64_t count = problem.images * problem.pixels;
  problem.labels = label_view(arguments.target, count, problem.classes, arguments.options.ignore_index);
  problem.class_weight = dense_values<accumulate_t>(arguments.weight, problem.classes, "weight");
  problem.pixel_weight = dense_values<accumulate_t>(arguments.pixel_weight, count, "pixel_weight");
  problem.scale = 1;
  problem.options = arguments.options;
  if (problem.classes == 1) problem.options.label_smoothing = 0;  // nothing to spread; the gradient stays exactly 0
  return problem;
}

bool takes_mean(const Options& options) { return options.reduction == kMean || options.reduction == kMeanOfCount; }

double mean_scale(const Options& options, double denominator) {
  return options.zero_if_empty && denominator == 0 ? 0.0 : 1 / denominator;
}

// loss: [N, P] without reduction, else [1]; denominator: [1].
template <typename scalar_t>
void finish(const Problem<scalar_t>& problem, const Sums& sums, const Tensor& loss, const Tensor& denominator) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const Options& options = problem.options;
  *dense_output<accumulate_t>(denominator, 1, "denominator") = static_cast<accumulate_t>(sums.denominator);
  if (options.reduction == kNone) return;
  double value = sums.loss;
  if (takes_mean(options)) value = options.zero_if_empty && sums.denominator == 0 ? 0.0 : value / sums.denominator;
  *dense_output<accumulate_t>(loss, 1, "loss") = static_cast<accumulate_t>(value);
}

// loss: [N, ...] without reduction, else []; denominator: []; gradient: that of the loss if with_gradient, which
// needs a reduction.
void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
             std::optional<Tensor> pixel_weight, int64_t ignore_index, int64_t reduction, double label_smoothing,
             double gamma, bool zero_if_empty, bool inert_ignored, bool with_gradient, const Tensor& loss,
             const Tensor& denominator, const Tensor& gradient) {
  FASTSEG_CHECK(!with_gradient || reduction != kNone, "the gradient in the forward needs a reduction");
  const Arguments arguments{input,
                            target,
                            weight,
                            pixel_weight,
                            {ignore_index, reduction, label_smoothing, gamma, zero_if_empty, inert_ignored}};
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const PixelWalk walk = walk_of(input, with_gradient ? &gradient : nullptr);
    Problem<scalar_t> problem = problem_of<scalar_t>(arguments, walk, with_gradient);
    if (reduction == kNone)
      problem.pixel_loss = dense_output<accumulate_t>(loss, problem.images * problem.pixels, "loss");
    if (with_gradient && takes_mean(arguments.options))
      problem.scale = mean_scale(arguments.options, count_denominator(problem));
    finish(problem, sweep(problem), loss, denominator);
  });
}

void backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
              std::optional<Tensor> pixel_weight, const Tensor& grad_loss, const Tensor& denominator,
              int64_t ignore_index, int64_t reduction, double label_smoothing, double gamma, bool zero_if_empty,
              bool inert_ignored, const Tensor& grad_input) {
  const Arguments arguments{input,
                            target,
                            weight,
                            pixel_weight,
                            {ignore_index, reduction, label_smoothing, gamma, zero_if_empty, inert_ignored}};
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const PixelWalk walk = walk_of(input, &grad_input);
    Problem<scalar_t> problem = problem_of<scalar_t>(arguments, walk, true);
    const int64_t count = reduction == kNone ? problem.images * problem.pixels : 1;
    problem.grad_output = dense_values<accumulate_t>(grad_loss, count, "grad_loss");
    if (takes_mean(arguments.options))
      problem.scale = mean_scale(arguments.options, *dense_values<accumulate_t>(denominator, 1, "denominator"));
    sweep(problem);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_cross_entropy", TORCH_BOX(&forward));
  m.impl("_cross_entropy_backward", TORCH_BOX(&backward));
}

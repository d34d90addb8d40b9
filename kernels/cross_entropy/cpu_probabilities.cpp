// Softmax cross entropy with probabilities as target on the CPU: entry points that turn tensors into a sweep, and their
// registration.
#include <optional>

#include <torch/csrc/stable/library.h>

#include "cross_entropy/probabilities.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"
#include "fastseg/reduction.h"

namespace {

using namespace fastseg;
using namespace fastseg::probability_targets;

// The arguments of the loss and of its gradients.
struct Arguments {
  const Tensor &input, &target;                       // [N, C, ...]
  const std::optional<Tensor>&weight, &pixel_weight;  // [C], [N, ...]
  int64_t reduction;
  double label_smoothing;
};

// Writes the outputs that are not null: loss ([N, ...] without reduction, else []), gradients like input and target.
// grad_loss: like loss; null stands for 1.
void run(const Arguments& arguments, const Tensor* grad_loss, const Tensor* loss, const Tensor* grad_input,
         const Tensor* grad_target) {
  const Tensor &input = arguments.input, &target = arguments.target;
  const bool is_double = input.scalar_type() == ScalarType::Double;
  FASTSEG_CHECK(is_double == (target.scalar_type() == ScalarType::Double),
                "input and target must both be float64, or neither of them");
  std::vector<Tensor> outputs;
  for (const auto& [gradient, like] : {std::pair{grad_input, &input}, std::pair{grad_target, &target}}) {
    if (!gradient) continue;
    FASTSEG_CHECK(gradient->scalar_type() == like->scalar_type(), "a gradient must be like its tensor");
    use_huge_pages(*gradient);
    outputs.push_back(*gradient);
  }
  const PixelWalk walk({input, target}, outputs);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    Problem<scalar_t> problem{};
    problem.images = walk.images;
    problem.classes = walk.classes;
    problem.pixels = walk.pixels;
    const int64_t count = problem.images * problem.pixels;
    problem.logits = walk.input<scalar_t>(0);
    if (grad_input) problem.gradient = walk.output<scalar_t>(2);
    problem.make_target_tiles = [&] {
      return target_tiles<accumulate_t>(walk, target, grad_target ? (grad_input ? 3 : 2) : -1);
    };
    problem.wants_target_gradient = grad_target != nullptr;
    problem.class_weight = dense_values<accumulate_t>(arguments.weight, problem.classes, "weight");
    problem.pixel_weight = dense_values<accumulate_t>(arguments.pixel_weight, count, "pixel_weight");
    const bool reduced = arguments.reduction != kNone;
    if (grad_loss) problem.grad_output = dense_values<accumulate_t>(*grad_loss, reduced ? 1 : count, "grad_loss");
    problem.reduced = reduced;
    problem.scale = arguments.reduction == kMean ? 1.0 / count : 1.0;
    problem.label_smoothing = arguments.label_smoothing;
    accumulate_t* losses = loss ? dense_output<accumulate_t>(*loss, reduced ? 1 : count, "loss") : nullptr;
    if (!reduced) problem.pixel_loss = losses;
    const double sum = sweep(problem);
    if (losses && reduced) *losses = static_cast<accumulate_t>(sum * problem.scale);
  });
}

void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
             std::optional<Tensor> pixel_weight, int64_t reduction, double label_smoothing, bool to_input,
             bool to_target, const Tensor& loss, const Tensor& grad_input, const Tensor& grad_target) {
  run({input, target, weight, pixel_weight, reduction, label_smoothing}, nullptr, &loss,
      to_input ? &grad_input : nullptr, to_target ? &grad_target : nullptr);
}

void backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
              std::optional<Tensor> pixel_weight, const Tensor& grad_loss, int64_t reduction, double label_smoothing,
              bool to_input, bool to_target, const Tensor& grad_input, const Tensor& grad_target) {
  run({input, target, weight, pixel_weight, reduction, label_smoothing}, &grad_loss, nullptr,
      to_input ? &grad_input : nullptr, to_target ? &grad_target : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_cross_entropy_probabilities", TORCH_BOX(&forward));
  m.impl("_cross_entropy_probabilities_backward", TORCH_BOX(&backward));
}

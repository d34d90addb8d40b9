// Softmax cross entropy and focal loss on the CPU: from tensors to a sweep, and the registration.
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cross_entropy/sweep.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;
using namespace fastseg::cross_entropy;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Only what memory safety needs is checked here.

template <typename value_t>
constexpr ScalarType type_of() {
  if (std::is_same_v<value_t, float>) return ScalarType::Float;
  if (std::is_same_v<value_t, double>) return ScalarType::Double;
  if (std::is_same_v<value_t, simd::Half>) return ScalarType::Half;
  return ScalarType::BFloat16;
}

template <typename scalar_t>
PixelView<scalar_t> pixel_view(const Tensor& tensor, scalar_t* data) {
  STD_TORCH_CHECK(tensor.dim() == 3, "not a [N, C, P] view of pixels");
  const int64_t class_stride =
      tensor.size(1) == 1 ? 1 : tensor.stride(1);  // of one element a stride means nothing
  const int64_t pixel_stride = tensor.size(2) == 1 ? 1 : tensor.stride(2);
  STD_TORCH_CHECK(class_stride == 1 || pixel_stride == 1, "neither classes nor pixels lie side by side");
  return {data, tensor.stride(0), class_stride, pixel_stride};
}

template <typename value_t>
const value_t* dense(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(
      tensor->scalar_type() == type_of<value_t>() && tensor->is_contiguous() && tensor->numel() == count,
      name, " must be contiguous, of the accumulator's dtype and hold ", count, " elements");
  return tensor->const_data_ptr<value_t>();
}

LabelView label_view(const Tensor& target, int64_t count, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.is_contiguous() && target.numel() == count, "target must be contiguous and hold ",
                  count, " labels");
  LabelView::Type type = LabelView::Type::int64;
  if (target.scalar_type() == ScalarType::Int) {
    type = LabelView::Type::int32;
  } else if (target.scalar_type() == ScalarType::Byte) {
    type = LabelView::Type::uint8;
  } else {
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64, int32 or uint8");
  }
  return {target.const_data_ptr(), type, ignore_index, classes};
}

template <typename scalar_t>
Problem<scalar_t> problem_of(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& pixel_weight, const Options& options) {
  using accumulate_t = simd::accumulate<scalar_t>;
  Problem<scalar_t> problem{};
  problem.logits = pixel_view(input, input.const_data_ptr<scalar_t>());
  problem.images = input.size(0);
  problem.classes = input.size(1);
  problem.pixels = input.size(2);
  STD_TORCH_CHECK(problem.classes >= 1 && problem.classes <= INT32_MAX,
                  "input must have 1 to 2^31 - 1 classes");
  const int64_t count = problem.images * problem.pixels;
  problem.labels = label_view(target, count, problem.classes, options.ignore_index);
  problem.class_weight = dense<accumulate_t>(weight, problem.classes, "weight");
  problem.pixel_weight = dense<accumulate_t>(pixel_weight, count, "pixel_weight");
  problem.scale = 1;
  problem.options = options;
  if (problem.classes == 1)
    problem.options.label_smoothing = 0;  // nothing to spread; the gradient stays exactly 0
  return problem;
}

template <typename scalar_t>
void want_gradient(Problem<scalar_t>& problem, const Tensor& grad_input) {
  STD_TORCH_CHECK(grad_input.dim() == 3 && grad_input.scalar_type() == type_of<scalar_t>() &&
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

// fn(scalar_t{}) for the four storage types.
template <typename Function>
void dispatch(const Tensor& input, const Function& fn) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Double:
      return fn(double{});
    case ScalarType::Half:
      return fn(simd::Half{});
    case ScalarType::BFloat16:
      return fn(simd::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "input must be float32, float64, float16 or bfloat16");
  }
}

template <typename value_t>
value_t* output(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type_of<value_t>() && tensor.is_contiguous() && tensor.numel() == count, name,
      " must be contiguous, of the accumulator's dtype and hold ", count, " elements");
  return tensor.mutable_data_ptr<value_t>();
}

// loss: [N, P] without reduction, else [1]; denominator: [1].
template <typename scalar_t>
void finish(const Problem<scalar_t>& problem, const Sums& sums, const Tensor& loss,
            const Tensor& denominator) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const Options& options = problem.options;
  *output<accumulate_t>(denominator, 1, "denominator") = static_cast<accumulate_t>(sums.denominator);
  if (options.reduction == kNone) return;
  double value = sums.loss;
  if (takes_mean(options))
    value = options.zero_if_empty && sums.denominator == 0 ? 0.0 : value / sums.denominator;
  *output<accumulate_t>(loss, 1, "loss") = static_cast<accumulate_t>(value);
}

void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
             std::optional<Tensor> pixel_weight, int64_t ignore_index, int64_t reduction,
             double label_smoothing, double gamma, bool zero_if_empty, const Tensor& loss,
             const Tensor& denominator) {
  dispatch(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    if (reduction == kNone)
      problem.pixel_loss = output<accumulate_t>(loss, problem.images * problem.pixels, "loss");
    finish(problem, sweep(problem), loss, denominator);
  });
}

void with_gradient(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                   std::optional<Tensor> pixel_weight, int64_t ignore_index, int64_t reduction,
                   double label_smoothing, double gamma, bool zero_if_empty, const Tensor& loss,
                   const Tensor& denominator, const Tensor& grad_input) {
  STD_TORCH_CHECK(reduction != kNone, "the gradient in the forward needs a reduction");
  dispatch(input, [&](auto zero) {
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
  dispatch(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    want_gradient(problem, grad_input);
    const int64_t count = reduction == kNone ? problem.images * problem.pixels : 1;
    problem.grad_output = dense<accumulate_t>(grad_output, count, "grad_output");
    if (takes_mean(options))
      problem.scale = mean_scale(options, *dense<accumulate_t>(denominator, 1, "denominator"));
    sweep(problem);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("_cross_entropy_with_gradient", TORCH_BOX(&with_gradient));
  m.impl("_cross_entropy_backward", TORCH_BOX(&backward));
}

// Upsampled cross-entropy and Dice statistics on the CPU: see README.md; the arithmetic is in block_row.h.
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cross_entropy_dice/loss_of_sums.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"
#include "fastseg/layout.h"
#include "sweep.h"

namespace upsample_cross_entropy {
namespace {

using fastseg::dense_values;
using fastseg::scalar;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Scales = std::optional<std::vector<double>>;

// The arguments all entry points share.
struct Arguments {
  Tensor input;   // [N, C, h, w]
  Tensor target;  // [N, H, W]
  std::optional<Tensor> weight, pixel_weight;
  Scales scale_factors;
  bool align_corners;
  int64_t ignore_index;
  double label_smoothing;
};

Arguments checked(Arguments arguments) {
  const Tensor& input = arguments.input;
  STD_TORCH_CHECK(input.dim() == 4 && arguments.target.dim() == 3 && arguments.target.size(0) == input.size(0),
                  "upsample_cross_entropy: input must be [N, C, h, w] and target [N, H, W]");
  for (int64_t size :
       {input.size(1), input.size(2), input.size(3), arguments.target.size(1), arguments.target.size(2)}) {
    STD_TORCH_CHECK(size > 0 && size < (int64_t{1} << 30), "upsample_cross_entropy: a dimension is 0 or above 2^30");
  }
  STD_TORCH_CHECK(!arguments.scale_factors || arguments.scale_factors->size() == 2,
                  "upsample_cross_entropy: scale_factors must be two numbers");
  arguments.target = torch::stable::contiguous(arguments.target);
  arguments.weight = fastseg::contiguous(arguments.weight);
  arguments.pixel_weight = fastseg::contiguous(arguments.pixel_weight);
  return arguments;
}

decltype(Problem::read_row) reader_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return &read_padded_row<float>;
    case ScalarType::Half:
      return &read_padded_row<c10::Half>;
    default:
      STD_TORCH_CHECK(type == ScalarType::BFloat16, "upsample_cross_entropy: bad dtype of input");
      return &read_padded_row<c10::BFloat16>;
  }
}

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

Problem make_problem(const Arguments& arguments, Task task) {
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  const Scales& scales = arguments.scale_factors;
  BilinearAxis vertical(input.size(2), target.size(1), arguments.align_corners, scales ? (*scales)[0] : 0.0);
  BilinearAxis horizontal(input.size(3), target.size(2), arguments.align_corners, scales ? (*scales)[1] : 0.0);
  Plan plan = make_plan(horizontal);
  Problem problem{task, true, input.size(0), input.size(1), std::move(vertical), std::move(horizontal), std::move(plan),
                  reader_of(input.scalar_type()), input.const_data_ptr(),
                  strides_of(input),
                  fastseg::label_view(target, target.numel(), input.size(1), arguments.ignore_index)};
  problem.class_weight = dense_values<float>(arguments.weight, problem.classes, "weight");
  problem.pixel_weight = dense_values<float>(arguments.pixel_weight, target.numel(), "pixel_weight");
  problem.label_smoothing = static_cast<float>(arguments.label_smoothing);
  double weights = static_cast<double>(problem.classes);
  if (problem.class_weight)
    weights = std::accumulate(problem.class_weight, problem.class_weight + problem.classes, 0.0);
  problem.class_weight_sum = static_cast<float>(weights);
  return problem;
}

Totals run_checked(const Problem& problem, const Arguments& arguments) {
  Totals totals = run(problem);
  if (!totals.labels_in_range) fastseg::throw_bad_label(problem.labels, arguments.target.numel());
  return totals;
}

// [N, C, h, w], channels_last if `input` is, else contiguous.
template <typename Make>
Tensor dense_like(const Tensor& input, const Make& make) {
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  if (input.is_contiguous() || !fastseg::is_channels_last(input)) return make(std::vector<int64_t>{n, c, h, w});
  return torch::stable::transpose(torch::stable::transpose(make(std::vector<int64_t>{n, h, w, c}), 1, 3), 2, 3);
}

Tensor zero_gradient(const Tensor& input) {
  return dense_like(input, [&](const std::vector<int64_t>& shape) {
    return torch::stable::new_zeros(input, shape, ScalarType::Float);
  });
}

// factor * gradient, a dense float tensor, as `type`. (What comes next reads it: it goes through the caches.)
Tensor scaled(Tensor gradient, double factor, ScalarType type) {
  STD_TORCH_CHECK(gradient.scalar_type() == ScalarType::Float && gradient.dim() == 4 &&
                      (gradient.is_contiguous() || fastseg::is_channels_last(gradient)),
                  "upsample_cross_entropy: gradient must be dense float32 [N, C, h, w]");
  Tensor result = dense_like(gradient, [&](const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(gradient, shape, type);
  });
  const float* from = gradient.const_data_ptr<float>();
  const int64_t count = gradient.numel();
  fastseg::with_floating_type(result, "dtype", [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* to = static_cast<scalar_t*>(result.mutable_data_ptr());
    const float scale = static_cast<float>(factor);
    fastseg::parallel_slices(count, fastseg::slice_count(count, 1 << 15), [&](int64_t, int64_t begin, int64_t end) {
      int64_t i = begin;
      if constexpr (!std::is_same_v<scalar_t, double>) {
        for (; i + kLanes <= end; i += kLanes) simd::store(to + i, simd::load(from + i) * scale);
      }
      for (; i < end; ++i) to[i] = static_cast<scalar_t>(from[i] * scale);
    });
  });
  return result;
}

// The gradient of a loss, of a mean of `count`, from the one that the forward made; 0 for a mean over nothing.
Tensor scaled_in_backward(Tensor gradient, Tensor grad_loss, Tensor count, ScalarType type) {
  const double number = fastseg::number_of(count, "count");
  return scaled(gradient, number != 0 ? fastseg::number_of(grad_loss, "grad_loss") / number : 0.0, type);
}

Tensor rounded(const Tensor& gradient, ScalarType type) {
  return type == ScalarType::Float ? gradient : scaled(gradient, 1.0, type);
}

void want_gradient(Problem& problem, Tensor& gradient) {
  problem.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  problem.gradient_strides = strides_of(gradient);
}

// The gradients of the statistics as the kernel takes them.
struct StatisticsGradient {
  std::vector<float> intersection, prediction;  // [N][C]
  float numerator;

  StatisticsGradient(int64_t count, const double* of_intersection, const double* of_prediction, double of_numerator,
                     bool squared)
      : intersection(of_intersection, of_intersection + count),
        prediction(of_prediction, of_prediction + count),
        numerator(static_cast<float>(of_numerator)) {
    for (float& value : prediction) value *= squared ? 2.0f : 1.0f;
  }
};

// The loss, the count that it is a mean of (1 for a sum), and count * its gradient: of no element if it is not wanted.
std::tuple<Tensor, Tensor, Tensor> loss(Tensor input, Tensor target, std::optional<Tensor> weight,
                                        std::optional<Tensor> pixel_weight, Scales scale_factors, bool align_corners,
                                        int64_t ignore_index, double label_smoothing, bool with_gradient, bool mean,
                                        bool zero_if_empty, ScalarType type) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, with_gradient ? Task::kGradient : Task::kLoss);
  Tensor gradient = with_gradient ? zero_gradient(input)
                                  : torch::stable::new_empty(input, std::vector<int64_t>{0}, ScalarType::Float);
  if (with_gradient) want_gradient(problem, gradient);
  const Totals totals = run_checked(problem, arguments);
  double value = totals.numerator;
  if (mean && totals.denominator == 0) {
    value = zero_if_empty ? 0.0 : NAN;
  } else if (mean) {
    value /= totals.denominator;
  }
  return {scalar(input, value, type), scalar(input, mean ? totals.denominator : 1.0), gradient};
}

Tensor pixels(Tensor input, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
              Scales scale_factors, bool align_corners, int64_t ignore_index, double label_smoothing) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kLoss);
  const std::vector<int64_t> shape{target.size(0), target.size(1), target.size(2)};
  Tensor losses = torch::stable::new_empty(input, shape, ScalarType::Float);
  fastseg::use_huge_pages(losses);
  problem.losses = static_cast<float*>(losses.mutable_data_ptr());
  run_checked(problem, arguments);
  return losses;
}

Tensor pixels_backward(Tensor input, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
                       Tensor grad_losses, Scales scale_factors, bool align_corners, int64_t ignore_index,
                       double label_smoothing) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kGradient);
  STD_TORCH_CHECK(grad_losses.scalar_type() == ScalarType::Float && grad_losses.numel() == target.numel(),
                  "grad_losses must be float32, [N, H, W]");
  problem.grad_losses = grad_losses.const_data_ptr<float>();  // any strides
  for (int dim = 0; dim < 3; ++dim) problem.grad_losses_strides[dim] = grad_losses.stride(dim);
  Tensor gradient = zero_gradient(input);
  want_gradient(problem, gradient);
  run_checked(problem, arguments);
  return rounded(gradient, input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> statistics(
    Tensor input, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight, Scales scale_factors,
    bool align_corners, int64_t ignore_index, double label_smoothing, bool squared) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kStatistics);
  problem.squared = squared;
  const Totals totals = run_checked(problem, arguments);
  const int64_t size = problem.images * problem.classes;
  std::vector<Tensor> sums;
  for (int64_t statistic = 0; statistic < 3; ++statistic) {
    const std::vector<int64_t> shape{problem.images, problem.classes};
    sums.push_back(torch::stable::new_empty(input, shape, ScalarType::Double));
    std::copy_n(totals.statistics.data() + statistic * size, size, sums.back().mutable_data_ptr<double>());
  }
  return {sums[0], sums[1], sums[2], scalar(input, totals.numerator), scalar(input, totals.denominator)};
}

// Gradient of the input, in float, from that of the statistics.
Tensor statistics_gradient(Problem& problem, const Arguments& arguments, const StatisticsGradient& given) {
  problem.task = Task::kStatisticsGradient;
  problem.grad_intersection = given.intersection.data();
  problem.grad_prediction = given.prediction.data();
  problem.grad_numerator = given.numerator;
  Tensor gradient = zero_gradient(arguments.input);
  want_gradient(problem, gradient);
  run_checked(problem, arguments);
  return gradient;
}

Tensor statistics_backward(Tensor input, Tensor target, std::optional<Tensor> weight,
                           std::optional<Tensor> pixel_weight, Tensor grad_intersection, Tensor grad_prediction,
                           Tensor grad_numerator, Scales scale_factors, bool align_corners, int64_t ignore_index,
                           double label_smoothing, bool squared) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kStatisticsGradient);
  problem.squared = squared;
  const int64_t count = problem.images * problem.classes;
  grad_intersection = torch::stable::contiguous(grad_intersection);
  grad_prediction = torch::stable::contiguous(grad_prediction);
  const StatisticsGradient given(count, dense_values<double>(grad_intersection, count, "grad_intersection"),
                                 dense_values<double>(grad_prediction, count, "grad_prediction"),
                                 *dense_values<double>(grad_numerator, 1, "grad_numerator"), squared);
  return rounded(statistics_gradient(problem, arguments, given), input.scalar_type());
}

// What the gradient of a loss is to be divided by: so that the cross-entropy's factor is exactly 1, and rounded once in
// the end, unless next to Dice it is nothing.
double unit_of(const std::vector<double>& dice_slopes, double numerator_slope) {
  double largest = 0;
  for (double slope : dice_slopes) largest = std::max(largest, std::abs(slope));
  const double size = std::abs(numerator_slope);
  return std::isfinite(size) && size > 1e-6 * largest ? 1 / numerator_slope : 1.0;
}

// The loss of the statistics, the unit, and unit * its gradient in float: of no element if it is not wanted.
std::tuple<Tensor, Tensor, Tensor> dice_loss(Tensor input, Tensor target, std::optional<Tensor> weight,
                                             std::optional<Tensor> pixel_weight, Scales scale_factors,
                                             bool align_corners, int64_t ignore_index, double label_smoothing,
                                             bool squared, double ce_weight, double dice_weight, double smooth,
                                             bool include_background, bool per_image, bool zero_if_empty,
                                             bool with_gradient, ScalarType type) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kStatistics);
  problem.squared = squared;
  const Totals totals = run_checked(problem, arguments);
  const int64_t count = problem.images * problem.classes;
  const double* statistics = totals.statistics.data();
  const loss_of_sums::Sums sums{
      statistics, statistics + count, statistics + 2 * count, totals.numerator, totals.denominator,
      problem.images, problem.classes,
      {ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty}};
  const Tensor loss = scalar(input, loss_of_sums::loss(sums), type);
  if (!with_gradient) {
    return {loss, scalar(input, 1.0), torch::stable::new_empty(input, std::vector<int64_t>{0}, ScalarType::Float)};
  }
  std::vector<double> slopes(2 * count);
  double of_numerator = 0;
  loss_of_sums::loss_gradient(sums, 1.0, slopes.data(), slopes.data() + count, &of_numerator);
  const double unit = unit_of(slopes, of_numerator);
  for (double& slope : slopes) slope *= unit;
  const StatisticsGradient given(count, slopes.data(), slopes.data() + count, of_numerator * unit, squared);
  return {loss, scalar(input, unit), statistics_gradient(problem, arguments, given)};
}

}  // namespace
}  // namespace upsample_cross_entropy

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_upsample_cross_entropy_loss", TORCH_BOX(&upsample_cross_entropy::loss));
  m.impl("_upsample_cross_entropy_scaled", TORCH_BOX(&upsample_cross_entropy::scaled_in_backward));
  m.impl("_upsample_cross_entropy_pixels", TORCH_BOX(&upsample_cross_entropy::pixels));
  m.impl("_upsample_cross_entropy_pixels_backward", TORCH_BOX(&upsample_cross_entropy::pixels_backward));
  m.impl("_upsample_cross_entropy_dice_loss", TORCH_BOX(&upsample_cross_entropy::dice_loss));
  m.impl("_upsample_softmax_statistics", TORCH_BOX(&upsample_cross_entropy::statistics));
  m.impl("_upsample_softmax_statistics_backward", TORCH_BOX(&upsample_cross_entropy::statistics_backward));
}

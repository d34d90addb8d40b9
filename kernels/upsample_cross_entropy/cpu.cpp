// Upsampled cross-entropy and Dice statistics on the CPU: see README.md; the arithmetic is in block_row.h.
#include <cmath>
#include <numeric>
#include <optional>

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

Arguments checked(const Arguments& arguments) {
  const Tensor& input = arguments.input;
  FASTSEG_CHECK(input.dim() == 4 && arguments.target.dim() == 3 && arguments.target.size(0) == input.size(0),
                "upsample_cross_entropy: input must be [N, C, h, w] and target [N, H, W]");
  for (int64_t size :
       {input.size(1), input.size(2), input.size(3), arguments.target.size(1), arguments.target.size(2)}) {
    FASTSEG_CHECK(size > 0 && size < (int64_t{1} << 30), "upsample_cross_entropy: a dimension is 0 or above 2^30");
  }
  FASTSEG_CHECK(!arguments.scale_factors || arguments.scale_factors->size() == 2,
                "upsample_cross_entropy: scale_factors must be two numbers");
  return arguments;
}

decltype(Problem::read_row) reader_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return &read_padded_row<float>;
    case ScalarType::Half: return &read_padded_row<c10::Half>;
    default:
      FASTSEG_CHECK(type == ScalarType::BFloat16, "upsample_cross_entropy: bad dtype of input");
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
  FASTSEG_CHECK(!scales || scales->size() == 2, "upsample_cross_entropy: scale_factors must be two numbers");
  BilinearAxis vertical(input.size(2), target.size(1), arguments.align_corners, scales ? (*scales)[0] : 0.0);
  BilinearAxis horizontal(input.size(3), target.size(2), arguments.align_corners, scales ? (*scales)[1] : 0.0);
  Plan plan = make_plan(horizontal);
  Problem problem{task,
                  true,
                  input.size(0),
                  input.size(1),
                  std::move(vertical),
                  std::move(horizontal),
                  std::move(plan),
                  reader_of(input.scalar_type()),
                  input.const_data_ptr(),
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

// The float buffer in which the kernel sums the gradient of the input: the output itself, or a scratch tensor if that
// has a half type.
class GradientSum {
 public:
  GradientSum(Problem& problem, const Tensor& input, const Tensor& output) : output_(output) {
    for (int64_t dim = 0; dim < 4; ++dim)
      FASTSEG_CHECK(output.dim() == 4 && output.size(dim) == input.size(dim), "the gradient must be like input");
    FASTSEG_CHECK(output.is_cpu() && (output.is_contiguous() || fastseg::is_channels_last(output)),
                  "the gradient must be dense");
    const bool is_float = output.scalar_type() == ScalarType::Float;
    FASTSEG_CHECK(is_float || output.scalar_type() == input.scalar_type(),
                  "the gradient must be float32 or of the dtype of input");
    if (!is_float) beside_.emplace(output.numel());
    values_ = is_float ? output.mutable_data_ptr<float>() : beside_->get();
    std::fill_n(values_, output.numel(), 0.0f);
    problem.gradient = values_;
    problem.gradient_strides = strides_of(output);
  }

  // Rounds the sum to the output's dtype.
  void finish() const {
    if (!beside_) return;
    const int64_t count = output_.numel();
    fastseg::with_floating_type(output_, "gradient", [&](auto zero) {
      using scalar_t = decltype(zero);
      if constexpr (!std::is_same_v<scalar_t, double>) {
        scalar_t* to = static_cast<scalar_t*>(output_.mutable_data_ptr());
        fastseg::parallel_slices(count, fastseg::slice_count(count, 1 << 15), [&](int64_t, int64_t begin, int64_t end) {
          int64_t i = begin;
          for (; i + kLanes <= end; i += kLanes) simd::store(to + i, simd::load(values_ + i));
          for (; i < end; ++i) to[i] = static_cast<scalar_t>(values_[i]);
        });
      }
    });
  }

 private:
  const Tensor& output_;
  std::optional<fastseg::Scratch<float>> beside_;
  float* values_;
};

// The gradients of the statistics, converted for the kernel.
struct StatisticsGradient {
  std::vector<float> intersection, prediction;  // [N][C]
  float numerator;

  StatisticsGradient(int64_t count, const double* of_intersection, const double* of_prediction, double of_numerator,
                     bool squared)
      : intersection(of_intersection, of_intersection + count), prediction(of_prediction, of_prediction + count),
        numerator(static_cast<float>(of_numerator)) {
    for (float& value : prediction) value *= squared ? 2.0f : 1.0f;
  }
};

// loss: []; count: [] fp64, the denominator of a mean, 1 for a sum; gradient, if with_gradient: float, like input,
// count times the gradient of the loss.
void loss(const Tensor& input, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
          Scales scale_factors, bool align_corners, int64_t ignore_index, double label_smoothing, bool mean,
          bool zero_if_empty, bool with_gradient, ScalarType, const Tensor& loss, const Tensor& count,
          const Tensor& gradient) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, with_gradient ? Task::kGradient : Task::kLoss);
  std::optional<GradientSum> sum;
  if (with_gradient) sum.emplace(problem, input, gradient);
  const Totals totals = run_checked(problem, arguments);
  if (sum) sum->finish();
  double value = totals.numerator;
  if (mean && totals.denominator == 0) {
    value = zero_if_empty ? 0.0 : NAN;
  } else if (mean) {
    value /= totals.denominator;
  }
  fastseg::write_number(loss, value, "loss");
  fastseg::write_number(count, mean ? totals.denominator : 1.0, "count");
}

// losses: [N, H, W] float.
void pixels(const Tensor& input, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
            Scales scale_factors, bool align_corners, int64_t ignore_index, double label_smoothing,
            const Tensor& losses) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kLoss);
  fastseg::use_huge_pages(losses);
  problem.losses = fastseg::dense_output<float>(losses, target.numel(), "losses");
  run_checked(problem, arguments);
}

// grad_losses: [N, H, W] float, of any strides.
void pixels_backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                     std::optional<Tensor> pixel_weight, const Tensor& grad_losses, Scales scale_factors,
                     bool align_corners, int64_t ignore_index, double label_smoothing, const Tensor& grad_input) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kGradient);
  FASTSEG_CHECK(grad_losses.is_cpu() && grad_losses.scalar_type() == ScalarType::Float && grad_losses.dim() == 3 &&
                    grad_losses.numel() == target.numel(),
                "grad_losses must be float32, [N, H, W]");
  problem.grad_losses = grad_losses.const_data_ptr<float>();
  for (int dim = 0; dim < 3; ++dim) problem.grad_losses_strides[dim] = grad_losses.stride(dim);
  const GradientSum sum(problem, input, grad_input);
  run_checked(problem, arguments);
  sum.finish();
}

// intersection, prediction, truth: [N, C]; numerator, denominator: []; all fp64.
void statistics(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                std::optional<Tensor> pixel_weight, Scales scale_factors, bool align_corners, int64_t ignore_index,
                double label_smoothing, bool squared, const Tensor& intersection, const Tensor& prediction,
                const Tensor& truth, const Tensor& numerator, const Tensor& denominator) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kStatistics);
  problem.squared = squared;
  const Totals totals = run_checked(problem, arguments);
  const int64_t size = problem.images * problem.classes;
  const double* from = totals.statistics.data();
  for (const Tensor* sums : {&intersection, &prediction, &truth}) {
    std::copy_n(from, size, fastseg::dense_output<double>(*sums, size, "a statistic"));
    from += size;
  }
  fastseg::write_number(numerator, totals.numerator, "numerator");
  fastseg::write_number(denominator, totals.denominator, "denominator");
}

// Computes the gradient of the input from that of the statistics.
void run_statistics_gradient(Problem& problem, const Arguments& arguments, const StatisticsGradient& given,
                             const Tensor& output) {
  problem.task = Task::kStatisticsGradient;
  problem.grad_intersection = given.intersection.data();
  problem.grad_prediction = given.prediction.data();
  problem.grad_numerator = given.numerator;
  const GradientSum sum(problem, arguments.input, output);
  run_checked(problem, arguments);
  sum.finish();
}

void statistics_backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                         std::optional<Tensor> pixel_weight, const Tensor& grad_intersection,
                         const Tensor& grad_prediction, const Tensor& grad_numerator, Scales scale_factors,
                         bool align_corners, int64_t ignore_index, double label_smoothing, bool squared,
                         const Tensor& grad_input) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kStatisticsGradient);
  problem.squared = squared;
  const int64_t count = problem.images * problem.classes;
  const StatisticsGradient given(count, dense_values<double>(grad_intersection, count, "grad_intersection"),
                                 dense_values<double>(grad_prediction, count, "grad_prediction"),
                                 *dense_values<double>(grad_numerator, 1, "grad_numerator"), squared);
  run_statistics_gradient(problem, arguments, given, grad_input);
}

// What the gradient of a loss is to be divided by: so that the cross-entropy's factor is exactly 1, and rounded once in
// the end, unless next to Dice it is nothing.
double unit_of(const std::vector<double>& dice_slopes, double numerator_slope) {
  double largest = 0;
  for (double slope : dice_slopes) largest = std::max(largest, std::abs(slope));
  const double size = std::abs(numerator_slope);
  return std::isfinite(size) && size > 1e-6 * largest ? 1 / numerator_slope : 1.0;
}

// loss: []; unit: [] fp64; gradient: float, like input, unit * that of the loss, if with_gradient.
void dice_loss(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
               std::optional<Tensor> pixel_weight, Scales scale_factors, bool align_corners, int64_t ignore_index,
               double label_smoothing, bool squared, double ce_weight, double dice_weight, double smooth,
               bool include_background, bool per_image, bool zero_if_empty, bool with_gradient, ScalarType,
               const Tensor& loss, const Tensor& unit, const Tensor& gradient) {
  const Arguments arguments =
      checked({input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing});
  Problem problem = make_problem(arguments, Task::kStatistics);
  problem.squared = squared;
  const Totals totals = run_checked(problem, arguments);
  const int64_t count = problem.images * problem.classes;
  const double* statistics = totals.statistics.data();
  const loss_of_sums::Sums sums{statistics,
                                statistics + count,
                                statistics + 2 * count,
                                totals.numerator,
                                totals.denominator,
                                problem.images,
                                problem.classes,
                                {ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty}};
  fastseg::write_number(loss, loss_of_sums::loss(sums), "loss");
  double divisor = 1;
  if (with_gradient) {
    std::vector<double> slopes(2 * count);
    double of_numerator = 0;
    loss_of_sums::loss_gradient(sums, 1.0, slopes.data(), slopes.data() + count, &of_numerator);
    divisor = unit_of(slopes, of_numerator);
    for (double& slope : slopes) slope *= divisor;
    const StatisticsGradient given(count, slopes.data(), slopes.data() + count, of_numerator * divisor, squared);
    run_statistics_gradient(problem, arguments, given, gradient);
  }
  fastseg::write_number(unit, divisor, "unit");
}

}  // namespace
}  // namespace upsample_cross_entropy

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy::loss));
  m.impl("_upsample_cross_entropy_pixels", TORCH_BOX(&upsample_cross_entropy::pixels));
  m.impl("_upsample_cross_entropy_pixels_backward", TORCH_BOX(&upsample_cross_entropy::pixels_backward));
  m.impl("_upsample_cross_entropy_dice", TORCH_BOX(&upsample_cross_entropy::dice_loss));
  m.impl("_upsample_softmax_statistics", TORCH_BOX(&upsample_cross_entropy::statistics));
  m.impl("_upsample_softmax_statistics_backward", TORCH_BOX(&upsample_cross_entropy::statistics_backward));
}

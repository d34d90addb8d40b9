// The loss from the sums of softmax (or sigmoid) statistics, and its gradient: a few numbers per image and class, in
// fp64.
#pragma once

#include <algorithm>

#include "fastseg/arguments.h"

namespace loss_of_sums {

using namespace fastseg;

struct Options {
  double ce_weight, dice_weight, smooth;
  bool include_background, per_image, zero_if_empty;
};

// The statistics as pointers.
struct Sums {
  const double* intersection;  // [N, C]
  const double* prediction;    // [N, C]
  const double* truth;         // [N, C]
  double numerator, denominator;
  int64_t images, classes;
  Options options;

  int64_t first_class() const { return options.include_background ? 0 : 1; }
  // The number of quotients whose mean is the Dice loss.
  int64_t quotients() const { return (options.per_image ? images : 1) * (classes - first_class()); }
  // 1 / count. 1 / 0 is infinity, so that 0 / 0 gives NaN, or 0 if zero_if_empty.
  double share(double count) const { return options.zero_if_empty && count == 0 ? 0.0 : 1 / count; }

  struct Quotient {
    double numerator, denominator;
  };
  // (2 I + smooth) / (P + T + smooth) of one class over images [begin, end).
  Quotient quotient(int64_t begin, int64_t end, int64_t c) const {
    Quotient result{options.smooth, options.smooth};
    for (int64_t n = begin; n < end; ++n) {
      result.numerator += 2 * intersection[n * classes + c];
      result.denominator += prediction[n * classes + c] + truth[n * classes + c];
    }
    return result;
  }
  // Calls body(begin, end, c) for every quotient, of images [begin, end) and class c.
  template <typename Body>
  void for_each_quotient(const Body& body) const {
    const int64_t step = options.per_image ? 1 : std::max<int64_t>(images, 1);
    for (int64_t begin = 0; begin < std::max<int64_t>(images, options.per_image ? 0 : 1); begin += step) {
      for (int64_t c = first_class(); c < classes; ++c) body(begin, std::min(begin + step, images), c);
    }
  }
};

inline Sums sums_of(const Tensor& intersection, const Tensor& prediction, const Tensor& truth, const Tensor& numerator,
                    const Tensor& denominator, const Options& options) {
  FASTSEG_CHECK(intersection.dim() == 2, "intersection must be [N, C]");
  const int64_t count = intersection.numel();
  return {dense_values<double>(intersection, count, "intersection"),
          dense_values<double>(prediction, count, "prediction"),
          dense_values<double>(truth, count, "truth"),
          *dense_values<double>(numerator, 1, "numerator"),
          *dense_values<double>(denominator, 1, "denominator"),
          intersection.size(0),
          intersection.size(1),
          options};
}

inline double loss(const Sums& sums) {
  const Options& options = sums.options;
  double loss = 0;
  if (options.ce_weight != 0) {
    const bool empty = options.zero_if_empty && sums.denominator == 0;
    loss += options.ce_weight * (empty ? 0.0 : sums.numerator / sums.denominator);
  }
  if (options.dice_weight != 0) {
    double total = 0;
    sums.for_each_quotient([&](int64_t begin, int64_t end, int64_t c) {
      const Sums::Quotient quotient = sums.quotient(begin, end, c);
      total += 1 - quotient.numerator / quotient.denominator;
    });
    const int64_t count = sums.quotients();
    loss += options.dice_weight * (options.zero_if_empty && count == 0 ? 0.0 : total / static_cast<double>(count));
  }
  return loss;
}

// Adds slope * d loss / d (intersection [N, C], prediction [N, C], numerator) to arguments that are 0.
inline void loss_gradient(const Sums& sums, double slope, double* intersection, double* prediction, double* numerator) {
  const Options& options = sums.options;
  if (options.ce_weight != 0) *numerator = slope * options.ce_weight * sums.share(sums.denominator);
  if (options.dice_weight == 0) return;
  const double each = slope * options.dice_weight * sums.share(static_cast<double>(sums.quotients()));
  sums.for_each_quotient([&](int64_t begin, int64_t end, int64_t c) {
    const Sums::Quotient quotient = sums.quotient(begin, end, c);
    for (int64_t n = begin; n < end; ++n) {
      intersection[n * sums.classes + c] = -2 * each / quotient.denominator;
      prediction[n * sums.classes + c] = each * quotient.numerator / (quotient.denominator * quotient.denominator);
    }
  });
}

inline void forward(const Tensor& intersection, const Tensor& prediction, const Tensor& truth, const Tensor& numerator,
                    const Tensor& denominator, double ce_weight, double dice_weight, double smooth,
                    bool include_background, bool per_image, bool zero_if_empty, ScalarType, const Tensor& result) {
  const Sums sums = sums_of(intersection, prediction, truth, numerator, denominator,
                            {ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty});
  write_number(result, loss(sums), "loss");
}

inline void backward(const Tensor& intersection, const Tensor& prediction, const Tensor& truth, const Tensor& numerator,
                     const Tensor& denominator, const Tensor& grad_loss, double ce_weight, double dice_weight,
                     double smooth, bool include_background, bool per_image, bool zero_if_empty,
                     const Tensor& grad_intersection, const Tensor& grad_prediction, const Tensor& grad_numerator) {
  const Sums sums = sums_of(intersection, prediction, truth, numerator, denominator,
                            {ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty});
  const int64_t count = sums.images * sums.classes;
  loss_gradient(sums, number_of(grad_loss, "grad_loss"),
                zeroed_output<double>(grad_intersection, count, "grad_intersection"),
                zeroed_output<double>(grad_prediction, count, "grad_prediction"),
                zeroed_output<double>(grad_numerator, 1, "grad_numerator"));
}

}  // namespace loss_of_sums

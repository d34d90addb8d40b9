// Softmax statistics (Dice sums and weighted cross-entropy) and their backward on the CPU: formulas in README.md.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cross_entropy_dice/gradient.h"
#include "cross_entropy_dice/loss_of_sums.h"
#include "cross_entropy_dice/softmax_tile.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;
using namespace softmax_statistics;

// The sums of a slice of the tiles. `first_image` is the image of row 0.
struct Sums {
  int64_t first_image = 0;
  std::vector<double> intersection, prediction, truth;  // [images of the slice, C]
  double numerator = 0, denominator = 0;
  bool labels_in_range = true;
};

// --- forward ---

template <typename scalar_t>
class Forward {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  explicit Forward(const Problem<scalar_t>& problem)
      : problem_(problem), softmax_(problem, PixelView<scalar_t>{}), lanes_(3 * problem.classes * kLanes),
        totals_(3 * problem.classes), smoothing_(static_cast<accumulate_t>(problem.label_smoothing / problem.classes)),
        weight_total_(problem.weight_total()) {
    intersection_ = lanes_.get();
    prediction_ = intersection_ + problem.classes * kLanes;
    truth_ = prediction_ + problem.classes * kLanes;
    std::fill(intersection_, intersection_ + 3 * problem.classes * kLanes, accumulate_t(0));
  }

  Sums run(int64_t begin, int64_t end) {
    const int64_t per_image = ceil_divide(problem_.pixels, softmax_.pixels);
    sums_.first_image = begin / per_image;
    int64_t current = sums_.first_image;
    for_each_tile(begin, end, problem_.pixels, softmax_.pixels, [&](int64_t image, int64_t first, int count) {
      if (image != current) close_image();
      current = image;
      sums_.labels_in_range &= softmax_.load_pixels(image * problem_.pixels + first, count);
      softmax_.access.visit(image, first, count, [&](const Tile<scalar_t>& tile) { add_tile(tile); });
      pixels_in_lanes_ += softmax_.pixels;
      if (pixels_in_lanes_ >= kMostPixelsInLanes) empty_lanes();
    });
    close_image();
    sums_.numerator = simd::reduce_add(numerator_);
    sums_.denominator = simd::reduce_add(denominator_);
    return std::move(sums_);
  }

 private:
  void add_tile(const Tile<scalar_t>& tile) {
    SoftmaxTile<scalar_t>& s = softmax_;
    tile_maximum(tile, problem_.classes, s.pixels, s.maximum);
    for (int i = 0; i < s.pixels; i += kLanes) {
      const vector_t logit = s.of_label(
          i, [&](int64_t c) { return simd::load(s.rows + c * s.stride + i); },
          [&](int64_t c, int k) { return s.rows[c * s.stride + k]; });
      simd::store(s.label_gap + i, simd::load(s.maximum + i) - logit);
    }
    if (smoothing_ != 0) {
      std::fill(s.class_sum, s.class_sum + s.pixels, accumulate_t(0));
      tile_softmax(tile, problem_.classes, s.pixels, s.maximum, s.sum,
                   [&](int64_t c, int i, vector_t shifted, vector_t) {
                     simd::store(s.class_sum + i, simd::load(s.class_sum + i) + problem_.weight_of(c) * shifted);
                   });
    } else {
      tile_softmax(tile, problem_.classes, s.pixels, s.maximum, s.sum, [](int64_t, int, vector_t, vector_t) {});
    }
    s.invert_sums();
    add_cross_entropy();
    problem_.squared ? add_predictions<true>() : add_predictions<false>();
    add_intersections();
  }

  // loss = v ((1 - smoothing) w_y (logsumexp - z_y) + smoothing / C (W logsumexp - sum_c w_c z_c))
  void add_cross_entropy() {
    const accumulate_t unsmoothed = static_cast<accumulate_t>(1 - problem_.label_smoothing);
    vector_t numerator{}, denominator{};
    for (int i = 0; i < softmax_.pixels; i += kLanes) {
      const vector_t log_sum = simd::log_finite(simd::load(softmax_.sum + i));
      const vector_t weight = simd::load(softmax_.target_weight + i);
      const vector_t share = simd::load(softmax_.share + i);
      vector_t loss = unsmoothed * weight * (log_sum + simd::load(softmax_.label_gap + i));
      if (smoothing_ != 0) loss += smoothing_ * (weight_total_ * log_sum - simd::load(softmax_.class_sum + i));
      numerator += simd::keep_where(softmax_.is_valid(i), share * loss);
      denominator += share * weight;
    }
    numerator_ += simd::convert<simd::f64x16>(numerator);
    denominator_ += simd::convert<simd::f64x16>(denominator);
  }

  template <bool squared>
  void add_predictions() {
    for_each_group(softmax_.pixels, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
      vector_t inverse[vectors];
      for (int v = 0; v < vectors; ++v) inverse[v] = simd::load(softmax_.inverse + first + v * kLanes);
      for (int64_t c = 0; c < problem_.classes; ++c) {
        const accumulate_t* row = softmax_.rows + c * softmax_.stride + first;
        vector_t total[2] = {};
        for (int v = 0; v < vectors; ++v) {
          const vector_t p = simd::load(row + v * kLanes) * inverse[v];
          total[v % 2] += squared ? p * p : p;
        }
        add_lanes(prediction_, c, total[0] + total[1]);
      }
    });
  }

  void add_intersections() {
    for (int i = 0; i < softmax_.pixels; i += kLanes) {
      const int32_t common = softmax_.common_label[i / kLanes];
      if (common >= 0) {
        const vector_t p = simd::load(softmax_.rows + common * softmax_.stride + i) * simd::load(softmax_.inverse + i);
        add_lanes(intersection_, common, p);
        const vector_t one = simd::splat(accumulate_t(1));
        add_lanes(truth_, common, simd::keep_where(softmax_.is_valid(i), one));
        continue;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t label = softmax_.labels[i + lane];
        if (label < 0) continue;
        intersection_[label * kLanes + lane] +=
            softmax_.rows[label * softmax_.stride + i + lane] * softmax_.inverse[i + lane];
        truth_[label * kLanes + lane] += 1;
      }
    }
  }

  FASTSEG_INLINE void add_lanes(accumulate_t* lanes, int64_t c, vector_t values) {
    accumulate_t* to = lanes + c * kLanes;
    simd::store(to, simd::load(to) + values);
  }

  // Lanes are fp32 (for half types, too) and accurate over these few pixels; sums of more are fp64.
  void empty_lanes() {
    for (size_t k = 0; k < totals_.size(); ++k) {
      accumulate_t* from = lanes_.get() + k * kLanes;
      totals_[k] += simd::reduce_add(simd::convert<simd::f64x16>(simd::load(from)));
      simd::store(from, vector_t{});
    }
    pixels_in_lanes_ = 0;
  }

  void close_image() {
    empty_lanes();
    const auto from = totals_.begin();
    const int64_t classes = problem_.classes;
    sums_.intersection.insert(sums_.intersection.end(), from, from + classes);
    sums_.prediction.insert(sums_.prediction.end(), from + classes, from + 2 * classes);
    sums_.truth.insert(sums_.truth.end(), from + 2 * classes, from + 3 * classes);
    std::fill(totals_.begin(), totals_.end(), 0.0);
  }

  static constexpr int kMostPixelsInLanes = 1024;

  const Problem<scalar_t>& problem_;
  SoftmaxTile<scalar_t> softmax_;
  Scratch<accumulate_t> lanes_;
  accumulate_t* intersection_;  // [C, 16], of the last few tiles, like the next two
  accumulate_t* prediction_;    // [C, 16]
  accumulate_t* truth_;         // [C, 16]
  int pixels_in_lanes_ = 0;
  std::vector<double> totals_;  // [3, C], of the current image: intersection, prediction, truth
  simd::f64x16 numerator_{}, denominator_{};
  accumulate_t smoothing_;     // label_smoothing / C
  accumulate_t weight_total_;  // W, sum of the class weights
  Sums sums_;
};

// --- entry points ---

// The arguments of the statistics and of their gradient.
struct Arguments {
  const Tensor &input, &target;                       // [N, C, ...], [N, ...]
  const std::optional<Tensor>&weight, &pixel_weight;  // [C], [N, ...]
  int64_t ignore_index;
  double label_smoothing;
  bool squared;
};

// The sums are per image, so images are not joined.
PixelWalk walk_of(const Tensor& input, const std::vector<Tensor>& outputs) {
  return PixelWalk({input}, outputs, /*may_join=*/false);
}

template <typename scalar_t>
Problem<scalar_t> problem_of(const Arguments& arguments, const PixelWalk& walk) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const int64_t count = walk.images * walk.pixels;
  return {walk.images,
          walk.classes,
          walk.pixels,
          walk.input<scalar_t>(0),
          label_view(arguments.target, count, walk.classes, arguments.ignore_index),
          dense_values<accumulate_t>(arguments.weight, walk.classes, "weight"),
          dense_values<accumulate_t>(arguments.pixel_weight, count, "pixel_weight"),
          arguments.label_smoothing,
          arguments.squared};
}

// Of the tiles.
template <typename scalar_t>
UnevenSlices slices_of(const Problem<scalar_t>& problem) {
  constexpr int64_t kFewestElements = 1 << 14;  // with fewer a second thread costs more than it saves
  const int tile = tile_pixels(problem.classes);
  const int64_t tiles = problem.images * ceil_divide(problem.pixels, tile);
  return UnevenSlices(tiles, ceil_divide(kFewestElements, problem.classes * tile));
}

// intersection, prediction, truth: [N, C]; numerator, denominator: []; all fp64.
void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
             std::optional<Tensor> pixel_weight, int64_t ignore_index, double label_smoothing, bool squared,
             const Tensor& intersection, const Tensor& prediction, const Tensor& truth, const Tensor& numerator,
             const Tensor& denominator) {
  const PixelWalk walk = walk_of(input, {});
  const int64_t count = walk.images * walk.classes;
  double* const of_intersection = zeroed_output<double>(intersection, count, "intersection");
  double* const of_prediction = zeroed_output<double>(prediction, count, "prediction");
  double* const of_truth = zeroed_output<double>(truth, count, "truth");
  double* const of_numerator = zeroed_output<double>(numerator, 1, "numerator");
  double* const of_denominator = zeroed_output<double>(denominator, 1, "denominator");
  const Arguments arguments{input, target, weight, pixel_weight, ignore_index, label_smoothing, squared};
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto problem = problem_of<scalar_t>(arguments, walk);
    if (problem.images * problem.pixels == 0) return;
    const UnevenSlices slices = slices_of(problem);
    std::vector<Sums> partial(slices.slices());
    slices.run([&](int64_t slice, int64_t begin, int64_t end) {
      partial[slice] = Forward<scalar_t>(problem).run(begin, end);
    });
    bool labels_in_range = true;
    for (const Sums& sums : partial) {
      const int64_t offset = sums.first_image * problem.classes;
      for (size_t k = 0; k < sums.truth.size(); ++k) {
        of_intersection[offset + k] += sums.intersection[k];
        of_prediction[offset + k] += sums.prediction[k];
        of_truth[offset + k] += sums.truth[k];
      }
      *of_numerator += sums.numerator;
      *of_denominator += sums.denominator;
      labels_in_range &= sums.labels_in_range;
    }
    if (!labels_in_range) throw_bad_label(problem.labels, problem.images * problem.pixels);
  });
}

template <typename accumulate_t>
std::vector<accumulate_t> converted(const Tensor& gradient, int64_t count, double factor, const char* name) {
  const double* values = dense_values<double>(gradient, count, name);
  std::vector<accumulate_t> result(count);
  for (int64_t k = 0; k < count; ++k) result[k] = static_cast<accumulate_t>(factor * values[k]);
  return result;
}

void backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
              std::optional<Tensor> pixel_weight, const Tensor& grad_intersection, const Tensor& grad_prediction,
              const Tensor& grad_numerator, int64_t ignore_index, double label_smoothing, bool squared,
              const Tensor& grad_input) {
  FASTSEG_CHECK(grad_input.scalar_type() == input.scalar_type(), "grad_input must be like input");
  use_huge_pages(grad_input);
  const PixelWalk walk = walk_of(input, {grad_input});
  const Arguments arguments{input, target, weight, pixel_weight, ignore_index, label_smoothing, squared};
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const auto problem = problem_of<scalar_t>(arguments, walk);
    if (problem.images * problem.pixels == 0) return;
    const int64_t count = problem.images * problem.classes;
    const Coefficients<accumulate_t> coefficients{
        converted<accumulate_t>(grad_intersection, count, 1, "grad_intersection"),
        converted<accumulate_t>(grad_prediction, count, squared ? 2 : 1, "grad_prediction"),
        converted<accumulate_t>(grad_numerator, 1, 1, "grad_numerator")[0]};
    const PixelView<scalar_t> gradient = walk.output<scalar_t>(1);
    slices_of(problem).run([&](int64_t slice, int64_t begin, int64_t end) {
      Backward<scalar_t>(problem, gradient, coefficients).run(begin, end);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_softmax_statistics", TORCH_BOX(&forward));
  m.impl("_softmax_statistics_backward", TORCH_BOX(&backward));
  m.impl("_loss_of_sums", TORCH_BOX(&loss_of_sums::forward));
  m.impl("_loss_of_sums_backward", TORCH_BOX(&loss_of_sums::backward));
}

// Sigmoid statistics (Dice sums and weighted cross-entropy of a mask) and their backward on the CPU: see README.md.
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fastseg/arguments.h"
#include "fastseg/elementwise.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;

struct Problem {
  int64_t images, pixels;                 // N, P
  FlatView logits, target, pixel_weight;  // [N, P]; pixel_weight may be null
  double pos_weight;
  std::optional<double> ignore_index;
  bool squared;
  bool must_be_binary;  // an integer target: 0, 1 or ignore_index

  int64_t chunks_per_image() const { return ceil_divide(pixels, kChunk); }
  UnevenSlices cut() const { return chunk_slices(images * chunks_per_image()); }
};

// A chunk of at most kChunk pixels in the accumulator type. Padding lanes are not valid. `all_count`: whole
// vectors, nothing ignored and no pixel weights, the usual case.
template <typename value_t, bool all_count>
struct Chunk {
  using accumulate_t = value_t;
  using vector_t = simd::vec<accumulate_t>;
  using mask_t = simd::mask<accumulate_t>;

  Chunk(const Problem& problem, int64_t offset, int count)
      : count(count), z_(read_chunk(problem.logits, offset, count, accumulate_t(0), buffers_[0])),
        y_(read_chunk(problem.target, offset, count, accumulate_t(0), buffers_[1])),
        weight_(problem.pixel_weight ? read_chunk(problem.pixel_weight, offset, count, accumulate_t(0), buffers_[2])
                                     : nullptr),
        ignored_(static_cast<accumulate_t>(problem.ignore_index.value_or(0))),
        ignores_(problem.ignore_index.has_value()) {}

  FASTSEG_INLINE mask_t valid(int i) const {
    if constexpr (all_count) return ~mask_t{};
    const mask_t inside = simd::convert<mask_t>(simd::lane_index() < simd::splat(int32_t(count - i)));
    return ignores_ ? inside & (simd::load(y_ + i) != ignored_) : inside;
  }
  // Logits and truth, 0 where not valid.
  FASTSEG_INLINE vector_t z(int i) const { return simd::keep_where(valid(i), simd::load(z_ + i)); }
  FASTSEG_INLINE vector_t y(int i) const { return simd::keep_where(valid(i), simd::load(y_ + i)); }
  // Pixel weight, 0 where not valid.
  FASTSEG_INLINE vector_t share(int i) const {
    if constexpr (all_count) return simd::splat(accumulate_t(1));
    return simd::keep_where(valid(i), weight_ ? simd::load(weight_ + i) : simd::splat(accumulate_t(1)));
  }

  const int count;

 private:
  alignas(64) accumulate_t buffers_[3][kChunk];
  const accumulate_t* z_;
  const accumulate_t* y_;
  const accumulate_t* weight_;
  accumulate_t ignored_;
  bool ignores_;
};

// Calls body(slice, image, chunk) for all chunks, slices in parallel, the chunks of a slice in order.
template <typename accumulate_t, typename Body>
void for_each_image_chunk(const Problem& problem, const Body& body) {
  const int64_t per_image = problem.chunks_per_image();
  const bool all_count = !problem.pixel_weight && !problem.ignore_index;
  problem.cut().run([&](int64_t slice, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / per_image, first = index % per_image * kChunk;
      const int count = static_cast<int>(std::min<int64_t>(kChunk, problem.pixels - first));
      const int64_t offset = image * problem.pixels + first;
      if (all_count && count % kLanes == 0) {
        body(slice, image, offset, Chunk<accumulate_t, true>(problem, offset, count));
      } else {
        body(slice, image, offset, Chunk<accumulate_t, false>(problem, offset, count));
      }
    }
    simd::stream_fence();
  });
}

struct ImageSums {
  int64_t image;
  double intersection = 0, prediction = 0, truth = 0;
};

// The sums of a slice of the chunks: of its images, in order, and of the cross-entropy.
struct Sums {
  std::vector<ImageSums> images;
  double numerator = 0, denominator = 0;
  bool binary = true;
};

template <typename scalar_t>
std::vector<Sums> run_forward(const Problem& problem) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  std::vector<Sums> partial(problem.cut().slices());
  for_each_image_chunk<accumulate_t>(problem, [&](int64_t slice, int64_t image, int64_t, const auto& chunk) {
    const accumulate_t pos_weight = static_cast<accumulate_t>(problem.pos_weight);
    constexpr int kFew = 8 * kLanes;
    LongSum<vector_t> intersections, predictions, truths, numerators, denominators;
    simd::mask<accumulate_t> odd{};
    for (int first = 0; first < chunk.count; first += kFew) {
      vector_t intersection{}, prediction{}, truth{}, numerator{}, denominator{};
      for (int i = first; i < std::min(first + kFew, chunk.count); i += kLanes) {
        const vector_t y = chunk.y(i), z = chunk.z(i), share = chunk.share(i);
        const Sigmoid<scalar_t> sigmoid(z);
        const vector_t p = simd::keep_where(chunk.valid(i), sigmoid.p);
        intersection += p * y;
        prediction += problem.squared ? p * p : p;
        truth += problem.squared ? y * y : y;
        const vector_t of_y = 1 + (pos_weight - 1) * y;
        const vector_t loss = ((1 - y) * z + of_y * sigmoid.hinge) + of_y * sigmoid.log_term;
        numerator += simd::keep_where(chunk.valid(i), share * loss);
        denominator += share;
        odd |= (y != vector_t{}) & (y != accumulate_t(1));
      }
      intersections.add(intersection);
      predictions.add(prediction);
      truths.add(truth);
      numerators.add(numerator);
      denominators.add(denominator);
    }
    Sums& sums = partial[slice];
    if (sums.images.empty() || sums.images.back().image != image) sums.images.push_back({image});
    sums.images.back().intersection += intersections.total();
    sums.images.back().prediction += predictions.total();
    sums.images.back().truth += truths.total();
    sums.numerator += numerators.total();
    sums.denominator += denominators.total();
    sums.binary &= !problem.must_be_binary || !simd::any(odd);
  });
  return partial;
}

// The gradients of the statistics.
struct Coefficients {
  const double* intersection;  // [N]
  const double* prediction;    // [N]
  double numerator;
};

template <typename scalar_t>
void run_backward(const Problem& problem, const Coefficients& coefficients, FlatView gradient) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  for_each_image_chunk<accumulate_t>(problem, [&](int64_t, int64_t image, int64_t offset, const auto& chunk) {
    const accumulate_t pos_weight = static_cast<accumulate_t>(problem.pos_weight);
    const accumulate_t grad_intersection = static_cast<accumulate_t>(coefficients.intersection[image]);
    const accumulate_t grad_prediction = static_cast<accumulate_t>(coefficients.prediction[image]);
    const accumulate_t grad_numerator = static_cast<accumulate_t>(coefficients.numerator);
    alignas(64) accumulate_t result[kChunk];
    for (int i = 0; i < chunk.count; i += kLanes) {
      const vector_t y = chunk.y(i);
      const Sigmoid<scalar_t> sigmoid(chunk.z(i));
      const vector_t p = sigmoid.p, q = sigmoid.q;
      const vector_t of_prediction = problem.squared ? 2 * grad_prediction * p : simd::splat(grad_prediction);
      const vector_t dice = p * q * (grad_intersection * y + of_prediction);
      const vector_t cross_entropy = (1 - y) * p - pos_weight * y * q;  // for pos_weight 1 this is p - y
      const vector_t total = dice + grad_numerator * chunk.share(i) * cross_entropy;
      simd::store(result + i, simd::keep_where(chunk.valid(i), total));
    }
    write_chunk(result, chunk.count, gradient, offset);
  });
}

// --- entry points ---

[[noreturn]] void throw_not_binary(const Problem& problem) {
  double value = 0;
  for (int64_t i = 0; i < problem.images * problem.pixels; ++i) {
    double buffer[kLanes];
    value = *read_chunk(problem.target, i, 1, 0.0, buffer);
    if (value != 0 && value != 1 && value != problem.ignore_index) break;
  }
  throw std::out_of_range("Target " + std::to_string(static_cast<int64_t>(value)) +
                          " is out of bounds: an integer mask holds 0, 1 and, if given, ignore_index");
}

double one_value(const Tensor& tensor, const char* name) {
  const FlatView view = flat_view(tensor, 1, name);
  with_floating_type(tensor, name, [](auto) {});
  double buffer[kLanes];
  return *read_chunk(view, 0, 1, 0.0, buffer);
}

Problem problem_of(const Tensor& input, const Tensor& target, const std::optional<Tensor>& pos_weight,
                   const std::optional<Tensor>& pixel_weight, std::optional<double> ignore_index, bool squared) {
  const int64_t images = input.size(0), pixels = input.size(1), count = images * pixels;
  with_floating_type(input, "input", [](auto) {});
  const ScalarType mask = target.scalar_type();
  const bool integer =
      mask == ScalarType::Bool || mask == ScalarType::Byte || mask == ScalarType::Int || mask == ScalarType::Long;
  if (!integer) with_floating_type(target, "target", [](auto) {});
  if (pixel_weight) with_floating_type(*pixel_weight, "pixel_weight", [](auto) {});
  return {images,
          pixels,
          flat_view(input, count, "input"),
          flat_view(target, count, "target"),
          pixel_weight ? flat_view(*pixel_weight, count, "pixel_weight") : FlatView{},
          pos_weight ? one_value(*pos_weight, "pos_weight") : 1.0,
          ignore_index,
          squared,
          integer};
}

// intersection, prediction, truth: [N]; numerator, denominator: []; all fp64.
void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> pos_weight,
             std::optional<Tensor> pixel_weight, std::optional<double> ignore_index, bool squared,
             const Tensor& intersection, const Tensor& prediction, const Tensor& truth, const Tensor& numerator,
             const Tensor& denominator) {
  FASTSEG_CHECK(input.dim() == 2, "input must be [N, P]");
  const Problem problem = problem_of(input, target, pos_weight, pixel_weight, ignore_index, squared);
  double* const of_intersection = zeroed_output<double>(intersection, problem.images, "intersection");
  double* const of_prediction = zeroed_output<double>(prediction, problem.images, "prediction");
  double* const of_truth = zeroed_output<double>(truth, problem.images, "truth");
  double* const of_numerator = zeroed_output<double>(numerator, 1, "numerator");
  double* const of_denominator = zeroed_output<double>(denominator, 1, "denominator");
  if (problem.images * problem.pixels == 0) return;
  bool binary = true;
  const auto run = [&](auto zero) { return run_forward<decltype(zero)>(problem); };
  for (const Sums& sums : with_digits_of(problem.logits, problem.target, run)) {
    for (const ImageSums& image : sums.images) {
      of_intersection[image.image] += image.intersection;
      of_prediction[image.image] += image.prediction;
      of_truth[image.image] += image.truth;
    }
    *of_numerator += sums.numerator;
    *of_denominator += sums.denominator;
    binary &= sums.binary;
  }
  if (!binary) throw_not_binary(problem);
}

void backward(const Tensor& input, const Tensor& target, std::optional<Tensor> pos_weight,
              std::optional<Tensor> pixel_weight, const Tensor& grad_intersection, const Tensor& grad_prediction,
              const Tensor& grad_numerator, std::optional<double> ignore_index, bool squared,
              const Tensor& grad_input) {
  FASTSEG_CHECK(input.dim() == 2, "input must be [N, P]");
  const Problem problem = problem_of(input, target, pos_weight, pixel_weight, ignore_index, squared);
  FASTSEG_CHECK(grad_input.scalar_type() == input.scalar_type(), "grad_input must be like input");
  use_huge_pages(grad_input);
  const FlatView to = flat_view(grad_input, problem.images * problem.pixels, "grad_input");
  if (problem.images * problem.pixels == 0) return;
  const Coefficients coefficients{dense_values<double>(grad_intersection, problem.images, "grad_intersection"),
                                  dense_values<double>(grad_prediction, problem.images, "grad_prediction"),
                                  *dense_values<double>(grad_numerator, 1, "grad_numerator")};
  with_digits_of(problem.logits, problem.target,
                 [&](auto zero) { run_backward<decltype(zero)>(problem, coefficients, to); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_sigmoid_statistics", TORCH_BOX(&forward));
  m.impl("_sigmoid_statistics_backward", TORCH_BOX(&backward));
}

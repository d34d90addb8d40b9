// Softmax cross entropy and focal loss on the CPU: formulas and byte counts in README.md.
#include <atomic>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/pixel_tile.h"

namespace {

using namespace fastseg;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2, kMeanOfCount = 3 };

struct Options {
  int64_t ignore_index;
  int64_t reduction;
  double label_smoothing;
  double gamma;
  bool zero_if_empty;
};

// One call, its tensors as pointers. accumulate_t is float, double for fp64.
template <typename scalar_t>
struct Problem {
  using accumulate_t = simd::accumulate<scalar_t>;
  int64_t images, classes, pixels;     // N, C, P
  PixelView<const scalar_t> logits;    // [N, C, P]
  PixelView<scalar_t> gradient;        // [N, C, P] or null: not wanted
  LabelView labels;                    // [N, P]
  const accumulate_t* class_weight;    // [C] or null
  const accumulate_t* pixel_weight;    // [N, P] or null
  const accumulate_t* grad_output;     // [N, P] without reduction, [1] with one; null stands for 1
  accumulate_t* pixel_loss;            // [N, P] or null
  double scale;                        // of every gradient: 1 / denominator under a mean
  Options options;
};

struct Sums {
  double loss = 0, denominator = 0;
  bool labels_in_range = true;
};

// Per-pixel numbers of one tile, all [T].
template <typename accumulate_t>
struct PixelNumbers {
  explicit PixelNumbers(int tile)
      : values(kArrays * tile), label_values(tile) {
    accumulate_t* next = values.get();
    for (accumulate_t** array : {&maximum, &sum, &target_logit, &target_weight, &pixel_weight, &extra, &scale,
                                 &label_excess, &smoothing_scale}) {
      *array = next;
      next += tile;
    }
    labels = label_values.get();
  }
  static constexpr int kArrays = 9;
  Scratch<accumulate_t> values;
  Scratch<int32_t> label_values;
  int32_t* labels;              // -1: ignored
  accumulate_t* maximum;        // largest logit
  accumulate_t* sum;            // of e^(logit - maximum) over the classes
  accumulate_t* target_logit;   // logit of the label
  accumulate_t* target_weight;  // class weight of the label, 0 where ignored
  accumulate_t* pixel_weight;   // pixel weight, 0 where ignored
  accumulate_t* extra;          // smoothing: sum of w_c (logit_c - maximum); focal: sum of the exponentials of the others
  // gradient = (e_c - [c = label] label_excess) scale - w_c smoothing_scale
  accumulate_t *scale, *label_excess, *smoothing_scale;
};

// Sweeps a slice of the tiles: loss, gradient or both.
template <typename scalar_t>
class Sweep {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  using mask_t = typename simd::vector_of<accumulate_t>::mask;

  explicit Sweep(const Problem<scalar_t>& problem)
      : problem_(problem),
        access_(problem.logits, problem.gradient, problem.classes),
        tile_(access_.tile()),
        numbers_(tile_),
        smoothing_(static_cast<accumulate_t>(problem.options.label_smoothing / problem.classes)),
        weight_total_(0) {
    for (int64_t c = 0; c < problem.classes; ++c) weight_total_ += weight_of(c);
  }

  Sums run(int64_t begin, int64_t end) {
    for_each_tile(begin, end, problem_.pixels, tile_, [&](int64_t image, int64_t first, int count) {
      const int64_t position = image * problem_.pixels + first;
      sums_.labels_in_range &= load_labels(problem_.labels, position, count, tile_, numbers_.labels);
      load_weights(position, count);
      access_.visit(image, first, count, [&](const auto& tile) { one_tile(tile, position, count); });
    });
    return sums_;
  }

 private:
  accumulate_t weight_of(int64_t c) const { return problem_.class_weight ? problem_.class_weight[c] : accumulate_t(1); }

  void load_weights(int64_t position, int count) {
    const vector_t one = simd::splat(accumulate_t(1));
    for (int i = 0; i < tile_; i += kLanes) {
      const mask_t valid = is_valid(i);
      vector_t weight = one, pixel_weight = one;
      if (problem_.class_weight) {
        for (int lane = 0; lane < kLanes; ++lane) weight[lane] = problem_.class_weight[std::max(numbers_.labels[i + lane], 0)];
      }
      if (problem_.pixel_weight && i < count) {
        const int here = std::min(kLanes, count - i);
        pixel_weight = simd::load_partial(problem_.pixel_weight + position + i, here, accumulate_t(0));
      }
      simd::store(numbers_.target_weight + i, valid ? weight : vector_t{});
      simd::store(numbers_.pixel_weight + i, valid ? pixel_weight : vector_t{});
    }
  }

  FASTSEG_INLINE mask_t is_valid(int i) const {
    return __builtin_convertvector(simd::load(numbers_.labels + i) >= simd::i32x16{}, mask_t);
  }

  template <typename tile_t>
  void one_tile(const tile_t& tile, int64_t position, int count) {
    tile_maximum(tile, problem_.classes, tile_, numbers_.maximum);
    for (int i = 0; i < tile_; ++i) numbers_.target_logit[i] = tile.at(std::max(numbers_.labels[i], 0), i);
    exponentials(tile);
    pixel_formulas(position, count);
    if (problem_.gradient.data) write_gradient(tile);
  }

  template <typename tile_t>
  void exponentials(const tile_t& tile) {
    accumulate_t* extra = numbers_.extra;
    const auto softmax = [&](const auto& each) {
      tile_softmax(tile, problem_.classes, tile_, access_.rows(), access_.row_stride(), numbers_.maximum, numbers_.sum, each);
    };
    if (problem_.options.gamma == 0 && problem_.options.label_smoothing == 0) {
      softmax([](int64_t, int, vector_t, vector_t) {});
      return;
    }
    std::fill(extra, extra + tile_, accumulate_t(0));
    if (problem_.options.gamma != 0) {
      softmax([&](int64_t c, int i, vector_t, vector_t exponential) {
        const vector_t others = is_label(c, i) ? vector_t{} : exponential;
        simd::store(extra + i, simd::load(extra + i) + others);
      });
    } else {
      softmax([&](int64_t c, int i, vector_t shifted, vector_t) {
        simd::store(extra + i, simd::load(extra + i) + weight_of(c) * shifted);
      });
    }
  }

  FASTSEG_INLINE mask_t is_label(int64_t c, int i) const {
    const simd::i32x16 same = simd::load(numbers_.labels + i) == simd::splat(static_cast<int32_t>(c));
    return __builtin_convertvector(same, mask_t);
  }

  // From the sums of every pixel to its loss and to the three factors of its gradient.
  void pixel_formulas(int64_t position, int count) {
    const bool focal = problem_.options.gamma != 0;
    const accumulate_t smoothed = static_cast<accumulate_t>(1 - problem_.options.label_smoothing);
    simd::f64x16 loss_sum{}, denominator_sum{};
    for (int i = 0; i < tile_; i += kLanes) {
      const mask_t valid = is_valid(i);
      const vector_t weight = simd::load(numbers_.target_weight + i);
      const vector_t pixel_weight = simd::load(numbers_.pixel_weight + i);
      const vector_t sum = simd::load(numbers_.sum + i);
      const vector_t behind = simd::load(numbers_.maximum + i) - simd::load(numbers_.target_logit + i);
      const vector_t log_sum = simd::log(sum);
      vector_t loss = weight * (behind + log_sum);
      vector_t slope = weight;         // gradient = slope p_c - label_slope [c = label] - ...
      vector_t label_excess = sum;     // sum * label_slope / slope
      if (focal) {
        const vector_t factor = focal_factors(i, behind, loss);
        loss *= weight;
        slope *= factor;
      } else if (smoothing_ != 0) {
        const vector_t uniform = weight_total_ * log_sum - simd::load(numbers_.extra + i);
        loss = smoothed * loss + smoothing_ * uniform;
        slope = smoothed * weight + smoothing_ * weight_total_;
        label_excess = slope == vector_t{} ? sum : sum * (smoothed * weight / slope);
      }
      loss = valid ? loss * pixel_weight : vector_t{};
      const vector_t share = problem_.options.reduction == kMean ? weight * pixel_weight : pixel_weight;
      loss_sum += __builtin_convertvector(loss, simd::f64x16);
      denominator_sum += __builtin_convertvector(share, simd::f64x16);
      if (problem_.pixel_loss && i < count) {
        simd::store_partial(problem_.pixel_loss + position + i, loss, std::min(kLanes, count - i));
      }
      if (problem_.gradient.data) {
        // An ignored pixel has scale 0 and not "no gradient": NaN logits give NaN there, as in stock PyTorch.
        const vector_t scale = valid ? gradient_scale(position, i, count) * pixel_weight : vector_t{};
        simd::store(numbers_.scale + i, (valid ? scale * slope : vector_t{}) / sum);
        simd::store(numbers_.label_excess + i, label_excess);
        simd::store(numbers_.smoothing_scale + i, scale * smoothing_);
      }
    }
    sums_.loss += simd::reduce_add(loss_sum);
    sums_.denominator += simd::reduce_add(denominator_sum);
  }

  vector_t gradient_scale(int64_t position, int i, int count) const {
    const accumulate_t scale = static_cast<accumulate_t>(problem_.scale);
    if (!problem_.grad_output) return simd::splat(scale);
    if (problem_.options.reduction != kNone) return simd::splat(scale * problem_.grad_output[0]);
    if (i >= count) return vector_t{};
    return simd::load_partial(problem_.grad_output + position + i, std::min(kLanes, count - i), accumulate_t(0));
  }

  // loss = (1 - p)^gamma (-log p) of the label's probability p, and the factor f of dloss/dlogit_c = f (p_c - [c = label]).
  // 1 - p is the sum of the other exponentials over the whole sum, so it keeps its digits as p goes to 1.
  vector_t focal_factors(int i, vector_t behind, vector_t& loss) const {
    const accumulate_t gamma = static_cast<accumulate_t>(problem_.options.gamma);
    const vector_t one = simd::splat(accumulate_t(1));
    const vector_t others = simd::load(numbers_.extra + i);
    const vector_t target = simd::exp_nonpositive(-behind);
    const vector_t sum = target + others;
    const vector_t miss = others / sum;
    const vector_t p = target / sum;
    // log(1 + others) where the label leads (target = 1), without losing a small `others` in the sum
    const vector_t grown = one + others;
    const vector_t log1p = grown == one ? others : simd::log(grown) * others / (grown - one);
    const vector_t surprise = target == one ? log1p : behind + simd::log(sum);
    const vector_t modulation = power(miss, gamma);
    const vector_t ratio = miss > vector_t{} ? p * surprise / miss : one;  // -> 1 as p -> 1
    loss = modulation * surprise;
    return modulation * (one + gamma * (p == vector_t{} ? vector_t{} : ratio));
  }

  static vector_t power(vector_t base, accumulate_t exponent) {
    if (exponent == 1) return base;
    if (exponent == 2) return base * base;
    return simd::exp(exponent * simd::log(base));
  }

  template <typename tile_t>
  void write_gradient(const tile_t& tile) const {
    accumulate_t* rows = access_.rows();
    const int64_t stride = access_.row_stride();
    for (int i = 0; i < tile_; ++i) {
      if (numbers_.labels[i] >= 0) rows[numbers_.labels[i] * stride + i] -= numbers_.label_excess[i];
    }
    for_each_group(tile_, [&](int first, auto vectors) {
      vector_t scale[vectors];
      for (int v = 0; v < vectors; ++v) scale[v] = simd::load(numbers_.scale + first + v * kLanes);
      for (int64_t c = 0; c < problem_.classes; ++c) {
        const accumulate_t weight = weight_of(c);
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          vector_t gradient = simd::load(rows + c * stride + i) * scale[v];
          if (smoothing_ != 0) gradient -= weight * simd::load(numbers_.smoothing_scale + i);
          tile.store(c, i, gradient);
        }
      }
    });
  }

  const Problem<scalar_t>& problem_;
  TileAccess<scalar_t> access_;
  int tile_;
  PixelNumbers<accumulate_t> numbers_;
  accumulate_t smoothing_;     // label_smoothing / C
  accumulate_t weight_total_;  // sum of the class weights
  Sums sums_;
};

[[noreturn]] void throw_bad_label(const LabelView& labels, int64_t count) {
  throw std::out_of_range("Target " + std::to_string(first_bad_label(labels, count)) + " is out of bounds: labels must be in [0, " +
                          std::to_string(labels.classes) + ") or equal to ignore_index=" + std::to_string(labels.ignore_index));
}

// Runs the whole problem. Throws IndexError for a label out of range.
template <typename scalar_t>
Sums sweep(const Problem<scalar_t>& problem) {
  constexpr int64_t kFewestElements = 1 << 14;  // below that a second thread costs more than it brings
  const int tile = tile_pixels(problem.classes);
  const int64_t tiles = problem.images * ceil_divide(problem.pixels, tile);
  const int64_t slices = slice_count(tiles, ceil_divide(kFewestElements, problem.classes * tile));
  std::vector<Sums> partial(slices);
  parallel_slices(tiles, slices, [&](int64_t slice, int64_t begin, int64_t end) {
    partial[slice] = Sweep<scalar_t>(problem).run(begin, end);
  });
  Sums total;
  for (const Sums& sums : partial) {
    total.loss += sums.loss;
    total.denominator += sums.denominator;
    total.labels_in_range &= sums.labels_in_range;
  }
  if (!total.labels_in_range) throw_bad_label(problem.labels, problem.images * problem.pixels);
  return total;
}

// What a mean divides by, from the labels alone.
template <typename scalar_t>
double count_denominator(const Problem<scalar_t>& problem) {
  constexpr int64_t kChunk = 1 << 12;
  const int64_t count = problem.images * problem.pixels;
  const int64_t chunks = ceil_divide(count, kChunk);
  const int64_t slices = slice_count(chunks, 4);
  std::vector<Sums> partial(slices);
  const bool weighted = problem.class_weight && problem.options.reduction == kMean;
  parallel_slices(chunks, slices, [&](int64_t slice, int64_t begin, int64_t end) {
    Scratch<int32_t> labels(kChunk);
    Sums sums;
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, count); first += kChunk) {
      const int here = static_cast<int>(std::min(kChunk, count - first));
      sums.labels_in_range &= load_labels(problem.labels, first, here, here, labels.get());
      for (int i = 0; i < here; ++i) {
        const int32_t label = labels.get()[i];
        if (label < 0) continue;
        sums.denominator += double(weighted ? problem.class_weight[label] : 1) *
                            double(problem.pixel_weight ? problem.pixel_weight[first + i] : 1);
      }
    }
    partial[slice] = sums;
  });
  Sums total;
  for (const Sums& sums : partial) {
    total.denominator += sums.denominator;
    total.labels_in_range &= sums.labels_in_range;
  }
  if (!total.labels_in_range) throw_bad_label(problem.labels, count);
  return total.denominator;
}

// --- from tensors to a Problem; only what memory safety needs is checked ---

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
  const int64_t class_stride = tensor.size(1) == 1 ? 1 : tensor.stride(1);  // of one element a stride means nothing
  const int64_t pixel_stride = tensor.size(2) == 1 ? 1 : tensor.stride(2);
  STD_TORCH_CHECK(class_stride == 1 || pixel_stride == 1, "neither classes nor pixels lie side by side");
  return {data, tensor.stride(0), class_stride, pixel_stride};
}

template <typename value_t>
const value_t* dense(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type_of<value_t>() && tensor->is_contiguous() && tensor->numel() == count,
                  name, " must be contiguous, of the accumulator's dtype and hold ", count, " elements");
  return tensor->const_data_ptr<value_t>();
}

LabelView label_view(const Tensor& target, int64_t count, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.is_contiguous() && target.numel() == count, "target must be contiguous and hold ", count, " labels");
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
  STD_TORCH_CHECK(problem.classes >= 1 && problem.classes <= INT32_MAX, "input must have 1 to 2^31 - 1 classes");
  const int64_t count = problem.images * problem.pixels;
  problem.labels = label_view(target, count, problem.classes, options.ignore_index);
  problem.class_weight = dense<accumulate_t>(weight, problem.classes, "weight");
  problem.pixel_weight = dense<accumulate_t>(pixel_weight, count, "pixel_weight");
  problem.scale = 1;
  problem.options = options;
  if (problem.classes == 1) problem.options.label_smoothing = 0;  // nothing to spread; the gradient stays exactly 0
  return problem;
}

template <typename scalar_t>
void want_gradient(Problem<scalar_t>& problem, const Tensor& grad_input) {
  STD_TORCH_CHECK(grad_input.dim() == 3 && grad_input.scalar_type() == type_of<scalar_t>() && grad_input.size(0) == problem.images &&
                      grad_input.size(1) == problem.classes && grad_input.size(2) == problem.pixels,
                  "grad_input must be like input");
  problem.gradient = pixel_view(grad_input, grad_input.mutable_data_ptr<scalar_t>());
}

bool takes_mean(const Options& options) { return options.reduction == kMean || options.reduction == kMeanOfCount; }

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
  STD_TORCH_CHECK(tensor.scalar_type() == type_of<value_t>() && tensor.is_contiguous() && tensor.numel() == count, name,
                  " must be contiguous, of the accumulator's dtype and hold ", count, " elements");
  return tensor.mutable_data_ptr<value_t>();
}

// loss: [N, P] without reduction, else [1]; denominator: [1].
template <typename scalar_t>
void finish(const Problem<scalar_t>& problem, const Sums& sums, const Tensor& loss, const Tensor& denominator) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const Options& options = problem.options;
  *output<accumulate_t>(denominator, 1, "denominator") = static_cast<accumulate_t>(sums.denominator);
  if (options.reduction == kNone) return;
  double value = sums.loss;
  if (takes_mean(options)) value = options.zero_if_empty && sums.denominator == 0 ? 0.0 : value / sums.denominator;
  *output<accumulate_t>(loss, 1, "loss") = static_cast<accumulate_t>(value);
}

void forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
             int64_t ignore_index, int64_t reduction, double label_smoothing, double gamma, bool zero_if_empty,
             const Tensor& loss, const Tensor& denominator) {
  dispatch(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    if (reduction == kNone) problem.pixel_loss = output<accumulate_t>(loss, problem.images * problem.pixels, "loss");
    finish(problem, sweep(problem), loss, denominator);
  });
}

void with_gradient(const Tensor& input, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
                   int64_t ignore_index, int64_t reduction, double label_smoothing, double gamma, bool zero_if_empty,
                   const Tensor& loss, const Tensor& denominator, const Tensor& grad_input) {
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

void backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
              const Tensor& grad_output, const Tensor& denominator, int64_t ignore_index, int64_t reduction,
              double label_smoothing, double gamma, bool zero_if_empty, const Tensor& grad_input) {
  dispatch(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const Options options{ignore_index, reduction, label_smoothing, gamma, zero_if_empty};
    Problem<scalar_t> problem = problem_of<scalar_t>(input, target, weight, pixel_weight, options);
    want_gradient(problem, grad_input);
    const int64_t count = reduction == kNone ? problem.images * problem.pixels : 1;
    problem.grad_output = dense<accumulate_t>(grad_output, count, "grad_output");
    if (takes_mean(options)) problem.scale = mean_scale(options, *dense<accumulate_t>(denominator, 1, "denominator"));
    sweep(problem);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("_cross_entropy_with_gradient", TORCH_BOX(&with_gradient));
  m.impl("_cross_entropy_backward", TORCH_BOX(&backward));
}

// Softmax statistics (Dice sums and weighted cross-entropy) and their backward on the CPU: formulas in README.md.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fastseg/arguments.h"
#include "fastseg/pixel_tile.h"

namespace {

using namespace fastseg;

// One call, its tensors as pointers. accumulate_t is float, double for fp64.
template <typename scalar_t>
struct Problem {
  using accumulate_t = simd::accumulate<scalar_t>;
  int64_t images, classes, pixels;   // N, C, P
  PixelView<const scalar_t> logits;  // [N, C, P]
  LabelView labels;                  // [N, P]
  const accumulate_t* class_weight;  // [C] or null
  const accumulate_t* pixel_weight;  // [N, P] or null
  double label_smoothing;
  bool squared;

  accumulate_t weight_of(int64_t c) const { return class_weight ? class_weight[c] : accumulate_t(1); }
  accumulate_t weight_total() const {
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) total += weight_of(c);
    return static_cast<accumulate_t>(total);
  }
};

// The gradients of the statistics, in the accumulator type.
template <typename accumulate_t>
struct Coefficients {
  std::vector<accumulate_t> intersection;  // [N, C]
  std::vector<accumulate_t> prediction;    // [N, C]; twice the gradient for the squared form
  accumulate_t numerator;
};

// What a slice of the tiles adds up. `first_image` is the image of row 0.
struct Sums {
  int64_t first_image = 0;
  std::vector<double> intersection, prediction, truth;  // [images of the slice, C]
  double numerator = 0, denominator = 0;
  bool labels_in_range = true;
};

// The softmax of one tile at a time, with the numbers both passes need per pixel.
template <typename scalar_t>
class SoftmaxTile {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  using mask_t = typename simd::vector_of<accumulate_t>::mask;

  SoftmaxTile(const Problem<scalar_t>& problem, PixelView<scalar_t> gradient)
      : problem(problem),
        access(problem.logits, gradient, problem.classes),
        pixels(access.tile()),
        rows(access.rows()),
        stride(access.row_stride()),
        values_(7 * pixels),
        label_values_(pixels),
        labels(label_values_.get()) {
    accumulate_t* next = values_.get();
    for (accumulate_t** array : {&maximum, &sum, &inverse, &extra, &share, &target_weight, &behind}) {
      *array = next;
      next += pixels;
    }
  }

  // Labels and weights of the tile; false if a label is out of range.
  bool load_pixels(int64_t position, int count) {
    const bool in_range = load_labels(problem.labels, position, count, pixels, labels);
    for (int i = 0; i < pixels; ++i) {
      const bool valid = labels[i] >= 0;
      share[i] = valid ? accumulate_t(1) : accumulate_t(0);
      target_weight[i] = valid ? problem.weight_of(labels[i]) : accumulate_t(0);
    }
    for (int i = 0; problem.pixel_weight && i < count; ++i) {
      if (labels[i] >= 0) share[i] = problem.pixel_weight[position + i];
    }
    return in_range;
  }

  // inverse[i] = 1 / sum[i]; 0 for ignored pixels, whose exponentials, should they be NaN, are wiped out.
  void invert_sums() {
    for (int i = 0; i < pixels; i += kLanes) {
      const mask_t valid = is_valid(i);
      const vector_t total = simd::load(sum + i);
      simd::store(inverse + i, valid ? accumulate_t(1) / total : vector_t{});
      if (!simd::any(~valid & (total != total))) continue;
      for (int lane = i; lane < i + kLanes; ++lane) {
        for (int64_t c = 0; labels[lane] < 0 && c < problem.classes; ++c) rows[c * stride + lane] = 0;
      }
    }
  }

  FASTSEG_INLINE mask_t is_valid(int i) const {
    return __builtin_convertvector(simd::load(labels + i) >= simd::splat(int32_t(0)), mask_t);
  }
  FASTSEG_INLINE mask_t is_label(int64_t c, int i) const {
    return __builtin_convertvector(simd::load(labels + i) == simd::splat(static_cast<int32_t>(c)), mask_t);
  }

  // The one class of 16 pixels (ignored ones apart), -1 if they are of several or all ignored.
  FASTSEG_INLINE int32_t common_label(int i) const {
    int32_t largest = -1;
    for (int lane = i; lane < i + kLanes; ++lane) largest = std::max(largest, labels[lane]);
    bool common = true;
    for (int lane = i; lane < i + kLanes; ++lane) common &= (labels[lane] == largest) | (labels[lane] < 0);
    return common ? largest : -1;
  }

  const Problem<scalar_t>& problem;
  TileAccess<scalar_t> access;
  const int pixels;         // T
  accumulate_t* const rows;  // exponentials [C, T], rows `stride` apart
  const int64_t stride;
  accumulate_t* maximum;        // [T] largest logit
  accumulate_t* sum;            // [T] of the exponentials
  accumulate_t* inverse;        // [T] 1 / sum, 0 where ignored
  accumulate_t* extra;          // [T] forward: sum of w_c (logit_c - maximum); backward: sum of p_c h_c
  accumulate_t* share;          // [T] pixel weight, 0 where ignored
  accumulate_t* target_weight;  // [T] class weight of the label, 0 where ignored
  accumulate_t* behind;         // [T] maximum - logit of the label

 private:
  Scratch<accumulate_t> values_;
  Scratch<int32_t> label_values_;

 public:
  int32_t* const labels;  // [T], -1 where ignored
};

// --- forward ---

template <typename scalar_t>
class Forward {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  using Lanes = simd::f64x16;

  explicit Forward(const Problem<scalar_t>& problem)
      : problem_(problem),
        softmax_(problem, PixelView<scalar_t>{}),
        lanes_(3 * problem.classes * kLanes),
        smoothing_(static_cast<accumulate_t>(problem.label_smoothing / problem.classes)),
        weight_total_(problem.weight_total()) {
    prediction_ = lanes_.get();
    intersection_ = prediction_ + problem.classes * kLanes;
    truth_ = intersection_ + problem.classes * kLanes;
    std::fill(prediction_, prediction_ + 3 * problem.classes * kLanes, 0.0);
  }

  Sums run(int64_t begin, int64_t end) {
    const int64_t per_image = ceil_divide(problem_.pixels, softmax_.pixels);
    sums_.first_image = begin / per_image;
    int64_t current = sums_.first_image;
    for_each_tile(begin, end, problem_.pixels, softmax_.pixels, [&](int64_t image, int64_t first, int count) {
      if (image != current) close_image();
      current = image;
      sums_.labels_in_range &= softmax_.load_pixels(image * problem_.pixels + first, count);
      softmax_.access.visit(image, first, count, [&](const auto& tile) { add_tile(tile); });
    });
    close_image();
    return std::move(sums_);
  }

 private:
  template <typename tile_t>
  void add_tile(const tile_t& tile) {
    SoftmaxTile<scalar_t>& s = softmax_;
    tile_maximum(tile, problem_.classes, s.pixels, s.maximum);
    for (int i = 0; i < s.pixels; ++i) s.behind[i] = s.maximum[i] - tile.at(std::max(s.labels[i], 0), i);
    if (smoothing_ != 0) {
      std::fill(s.extra, s.extra + s.pixels, accumulate_t(0));
      tile_softmax(tile, problem_.classes, s.pixels, s.rows, s.stride, s.maximum, s.sum,
                   [&](int64_t c, int i, vector_t shifted, vector_t) {
                     simd::store(s.extra + i, simd::load(s.extra + i) + problem_.weight_of(c) * shifted);
                   });
    } else {
      tile_softmax(tile, problem_.classes, s.pixels, s.rows, s.stride, s.maximum, s.sum,
                   [](int64_t, int, vector_t, vector_t) {});
    }
    s.invert_sums();
    add_cross_entropy();
    problem_.squared ? add_predictions<true>() : add_predictions<false>();
    add_intersections();
  }

  // loss = v ((1 - smoothing) w_y (logsumexp - z_y) + smoothing / C (W logsumexp - sum_c w_c z_c))
  void add_cross_entropy() {
    const accumulate_t plain = static_cast<accumulate_t>(1 - problem_.label_smoothing);
    vector_t numerator{}, denominator{};
    for (int i = 0; i < softmax_.pixels; i += kLanes) {
      const vector_t log_sum = simd::log(simd::load(softmax_.sum + i));
      const vector_t weight = simd::load(softmax_.target_weight + i);
      const vector_t share = simd::load(softmax_.share + i);
      vector_t loss = plain * weight * (log_sum + simd::load(softmax_.behind + i));
      if (smoothing_ != 0) loss += smoothing_ * (weight_total_ * log_sum - simd::load(softmax_.extra + i));
      numerator += softmax_.is_valid(i) ? share * loss : vector_t{};
      denominator += share * weight;
    }
    sums_.numerator += simd::reduce_add(__builtin_convertvector(numerator, Lanes));
    sums_.denominator += simd::reduce_add(__builtin_convertvector(denominator, Lanes));
  }

  // fp32 within the tile, fp64 across tiles.
  template <bool squared>
  void add_predictions() {
    for_each_group(softmax_.pixels, [&](int first, auto vectors) {
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
      const int32_t common = softmax_.common_label(i);
      if (common >= 0) {
        const vector_t p = simd::load(softmax_.rows + common * softmax_.stride + i) * simd::load(softmax_.inverse + i);
        add_lanes(intersection_, common, p);
        const vector_t one = simd::splat(accumulate_t(1));
        add_lanes(truth_, common, softmax_.is_valid(i) ? one : vector_t{});
        continue;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t label = softmax_.labels[i + lane];
        if (label < 0) continue;
        intersection_[label * kLanes + lane] += softmax_.rows[label * softmax_.stride + i + lane] * softmax_.inverse[i + lane];
        truth_[label * kLanes + lane] += 1;
      }
    }
  }

  FASTSEG_INLINE void add_lanes(double* lanes, int64_t c, vector_t values) {
    double* to = lanes + c * kLanes;
    simd::store(to, simd::load(to) + __builtin_convertvector(values, Lanes));
  }

  void close_image() {
    for (auto [lanes, sums] : {std::pair(intersection_, &sums_.intersection), std::pair(prediction_, &sums_.prediction),
                               std::pair(truth_, &sums_.truth)}) {
      for (int64_t c = 0; c < problem_.classes; ++c) sums->push_back(simd::reduce_add(simd::load(lanes + c * kLanes)));
      std::fill(lanes, lanes + problem_.classes * kLanes, 0.0);
    }
  }

  const Problem<scalar_t>& problem_;
  SoftmaxTile<scalar_t> softmax_;
  Scratch<double> lanes_;
  double* prediction_;    // [C, 16], of the current image, as are the next two
  double* intersection_;  // [C, 16]
  double* truth_;         // [C, 16]
  accumulate_t smoothing_;     // label_smoothing / C
  accumulate_t weight_total_;  // W, sum of the class weights
  Sums sums_;
};

// --- backward ---

template <typename scalar_t>
class Backward {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  using Wide = simd::f64x16;

  Backward(const Problem<scalar_t>& problem, PixelView<scalar_t> gradient, const Coefficients<accumulate_t>& coefficients)
      : problem_(problem),
        coefficients_(coefficients),
        softmax_(problem, gradient),
        at_label_(softmax_.pixels),
        target_(softmax_.pixels),
        smoothing_(static_cast<accumulate_t>(problem.label_smoothing / problem.classes)),
        weight_total_(problem.weight_total()) {}

  bool run(int64_t begin, int64_t end) {
    bool labels_in_range = true;
    for_each_tile(begin, end, problem_.pixels, softmax_.pixels, [&](int64_t image, int64_t first, int count) {
      labels_in_range &= softmax_.load_pixels(image * problem_.pixels + first, count);
      const accumulate_t* prediction = coefficients_.prediction.data() + image * problem_.classes;
      const accumulate_t* intersection = coefficients_.intersection.data() + image * problem_.classes;
      softmax_.access.visit(image, first, count, [&](const auto& tile) {
        tile_maximum(tile, problem_.classes, softmax_.pixels, softmax_.maximum);
        if (problem_.squared) {
          differentiate<true>(tile, prediction, intersection);
        } else {
          differentiate<false>(tile, prediction, intersection);
        }
      });
    });
    return labels_in_range;
  }

 private:
  template <bool squared, typename tile_t>
  void differentiate(const tile_t& tile, const accumulate_t* prediction, const accumulate_t* intersection) {
    exponentials<squared>(tile, prediction);
    softmax_.invert_sums();
    pixel_factors<squared>(intersection);
    if (smoothing_ != 0) {
      write_gradient<squared, true>(tile, prediction);
    } else {
      write_gradient<squared, false>(tile, prediction);
    }
  }

  // rows = e^(z - maximum), sum = their sum, extra = sum_c dP_c e_c^2 (or e_c): all of one read of the tile.
  template <bool squared, typename tile_t>
  void exponentials(const tile_t& tile, const accumulate_t* prediction) {
    for_each_group(softmax_.pixels, [&](int first, auto vectors) {
      vector_t largest[vectors], total[vectors], dot[vectors];
      for (int v = 0; v < vectors; ++v) {
        largest[v] = simd::load(softmax_.maximum + first + v * kLanes);
        total[v] = dot[v] = vector_t{};
      }
      for (int64_t c = 0; c < problem_.classes; ++c) {
        const accumulate_t factor = prediction[c];
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          const vector_t e = simd::exp(tile.load(c, i) - largest[v]);
          total[v] += e;
          dot[v] += squared ? factor * e * e : factor * e;
          simd::store(softmax_.rows + c * softmax_.stride + i, e);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        simd::store(softmax_.sum + first + v * kLanes, total[v]);
        simd::store(softmax_.extra + first + v * kLanes, dot[v]);
      }
    });
  }

  // gradient_c = p_c (dP_c p_c + (c = label ? at_label : extra)) + target (p_c - [c = label]) + behind (p_c W - w_c)
  // for the four numbers set here; the terms are kept apart because each cancels within itself.
  template <bool squared>
  void pixel_factors(const accumulate_t* intersection) {
    const accumulate_t plain = static_cast<accumulate_t>(1 - problem_.label_smoothing);
    for (int i = 0; i < softmax_.pixels; ++i) {
      const int32_t label = softmax_.labels[i];
      target_.get()[i] = softmax_.rows[std::max(label, 0) * softmax_.stride + i];
      at_label_.get()[i] = label < 0 ? accumulate_t(0) : intersection[label];
    }
    // In fp64, which costs little per pixel: the dot product cancels against the largest terms of the gradient.
    for (int i = 0; i < softmax_.pixels; i += kLanes) {
      const Wide rough = wide(simd::load(softmax_.inverse + i));
      const Wide inverse = rough * (2.0 - wide(simd::load(softmax_.sum + i)) * rough);  // one Newton step
      const Wide at_label = wide(simd::load(at_label_.get() + i));
      Wide dot = wide(simd::load(softmax_.extra + i)) * inverse;
      if (squared) dot *= inverse;
      dot += wide(simd::load(target_.get() + i)) * inverse * at_label;
      // (no 0 * inf when nothing is valid and the mean divides by 0)
      const vector_t share = simd::load(softmax_.share + i);
      const vector_t scale = softmax_.is_valid(i) ? share * coefficients_.numerator : vector_t{};
      simd::store(at_label_.get() + i, __builtin_convertvector(at_label - dot, vector_t));
      simd::store(softmax_.extra + i, softmax_.is_valid(i) ? __builtin_convertvector(-dot, vector_t) : vector_t{});
      simd::store(target_.get() + i, plain * simd::load(softmax_.target_weight + i) * scale);
      simd::store(softmax_.behind + i, smoothing_ * scale);
    }
  }

  FASTSEG_INLINE static Wide wide(vector_t lanes) { return __builtin_convertvector(lanes, Wide); }

  template <bool squared, bool smoothed, typename tile_t>
  void write_gradient(const tile_t& tile, const accumulate_t* prediction) {
    for_each_group(softmax_.pixels, [&](int first, auto vectors) {
      vector_t inverse[vectors], minus_dot[vectors];
      for (int v = 0; v < vectors; ++v) {
        inverse[v] = simd::load(softmax_.inverse + first + v * kLanes);
        minus_dot[v] = simd::load(softmax_.extra + first + v * kLanes);
      }
      for (int64_t c = 0; c < problem_.classes; ++c) {
        const accumulate_t weight = smoothed ? problem_.weight_of(c) : accumulate_t(0);
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          const auto is_label = softmax_.is_label(c, i);
          const vector_t p = simd::load(softmax_.rows + c * softmax_.stride + i) * inverse[v];
          const vector_t base = is_label ? simd::load(at_label_.get() + i) : minus_dot[v];
          const vector_t of_p = base + (squared ? prediction[c] * p : simd::splat(prediction[c]));
          vector_t gradient = p * of_p + simd::load(target_.get() + i) * (is_label ? p - 1 : p);
          if (smoothed) gradient += simd::load(softmax_.behind + i) * (p * weight_total_ - weight);
          tile.store(c, i, gradient);
        }
      }
    });
  }

  const Problem<scalar_t>& problem_;
  const Coefficients<accumulate_t>& coefficients_;
  SoftmaxTile<scalar_t> softmax_;
  Scratch<accumulate_t> at_label_;  // [T] dI of the label, less the dot product
  Scratch<accumulate_t> target_;    // [T] weight of the pixel's cross-entropy, 0 where ignored
  accumulate_t smoothing_;          // label_smoothing / C
  accumulate_t weight_total_;       // W, sum of the class weights
};

// --- entry points ---

template <typename scalar_t>
Problem<scalar_t> problem_of(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& pixel_weight, int64_t ignore_index, double label_smoothing,
                             bool squared) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const int64_t images = input.size(0), classes = input.size(1), pixels = input.size(2);
  return {images,
          classes,
          pixels,
          pixel_view(input, input.const_data_ptr<scalar_t>()),
          label_view(target, images * pixels, classes, ignore_index),
          dense_values<accumulate_t>(weight, classes, "weight"),
          dense_values<accumulate_t>(pixel_weight, images * pixels, "pixel_weight"),
          label_smoothing,
          squared};
}

// Calls body(slice, begin, end) over the tiles; returns after the last.
template <typename scalar_t, typename Body>
void in_slices(const Problem<scalar_t>& problem, int64_t slices, const Body& body) {
  parallel_slices(problem.images * ceil_divide(problem.pixels, tile_pixels(problem.classes)), slices, body);
}

template <typename scalar_t>
int64_t slices_of(const Problem<scalar_t>& problem) {
  constexpr int64_t kFewestElements = 1 << 14;  // below that a second thread costs more than it brings
  const int tile = tile_pixels(problem.classes);
  const int64_t tiles = problem.images * ceil_divide(problem.pixels, tile);
  return slice_count(tiles, ceil_divide(kFewestElements, problem.classes * tile));
}

Tensor walkable(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 3, "input must be [N, C, P]");
  return is_pixel_view(input) ? input : torch::stable::contiguous(input);
}

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                   std::optional<Tensor> pixel_weight, int64_t ignore_index, double label_smoothing, bool squared) {
  const Tensor logits = walkable(input), labels = torch::stable::contiguous(target);
  weight = contiguous(weight);
  pixel_weight = contiguous(pixel_weight);
  const std::vector<int64_t> shape = {input.size(0), input.size(1)};
  Tensor intersection = torch::stable::new_zeros(input, shape, ScalarType::Double);
  Tensor prediction = torch::stable::new_zeros(input, shape, ScalarType::Double);
  Tensor truth = torch::stable::new_zeros(input, shape, ScalarType::Double);
  Tensor numerator = torch::stable::new_zeros(input, std::vector<int64_t>{}, ScalarType::Double);
  Tensor denominator = torch::stable::new_zeros(input, std::vector<int64_t>{}, ScalarType::Double);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto problem = problem_of<scalar_t>(logits, labels, weight, pixel_weight, ignore_index, label_smoothing, squared);
    if (problem.images * problem.pixels == 0) return;
    std::vector<Sums> partial(slices_of(problem));
    in_slices(problem, partial.size(), [&](int64_t slice, int64_t begin, int64_t end) {
      partial[slice] = Forward<scalar_t>(problem).run(begin, end);
    });
    bool labels_in_range = true;
    for (const Sums& sums : partial) {
      const int64_t offset = sums.first_image * problem.classes;
      for (size_t k = 0; k < sums.truth.size(); ++k) {
        intersection.mutable_data_ptr<double>()[offset + k] += sums.intersection[k];
        prediction.mutable_data_ptr<double>()[offset + k] += sums.prediction[k];
        truth.mutable_data_ptr<double>()[offset + k] += sums.truth[k];
      }
      *numerator.mutable_data_ptr<double>() += sums.numerator;
      *denominator.mutable_data_ptr<double>() += sums.denominator;
      labels_in_range &= sums.labels_in_range;
    }
    if (!labels_in_range) throw_bad_label(problem.labels, problem.images * problem.pixels);
  });
  return {intersection, prediction, truth, numerator, denominator};
}

template <typename accumulate_t>
std::vector<accumulate_t> converted(const Tensor& gradient, int64_t count, double factor, const char* name) {
  const Tensor dense = torch::stable::contiguous(gradient);
  const double* values = dense_values<double>(dense, count, name);
  std::vector<accumulate_t> result(count);
  for (int64_t k = 0; k < count; ++k) result[k] = static_cast<accumulate_t>(factor * values[k]);
  return result;
}

Tensor backward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                std::optional<Tensor> pixel_weight, const Tensor& grad_intersection, const Tensor& grad_prediction,
                const Tensor& grad_numerator, int64_t ignore_index, double label_smoothing, bool squared) {
  const Tensor logits = walkable(input), labels = torch::stable::contiguous(target);
  weight = contiguous(weight);
  pixel_weight = contiguous(pixel_weight);
  Tensor grad_input = torch::stable::empty_like(logits);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const auto problem = problem_of<scalar_t>(logits, labels, weight, pixel_weight, ignore_index, label_smoothing, squared);
    if (problem.images * problem.pixels == 0) return;
    const int64_t count = problem.images * problem.classes;
    const Coefficients<accumulate_t> coefficients{
        converted<accumulate_t>(grad_intersection, count, 1, "grad_intersection"),
        converted<accumulate_t>(grad_prediction, count, squared ? 2 : 1, "grad_prediction"),
        converted<accumulate_t>(grad_numerator, 1, 1, "grad_numerator")[0]};
    const PixelView<scalar_t> gradient = pixel_view(grad_input, grad_input.mutable_data_ptr<scalar_t>());
    in_slices(problem, slices_of(problem), [&](int64_t slice, int64_t begin, int64_t end) {
      Backward<scalar_t>(problem, gradient, coefficients).run(begin, end);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_softmax_statistics_forward", TORCH_BOX(&forward));
  m.impl("_softmax_statistics_backward", TORCH_BOX(&backward));
}

// Sigmoid focal loss on the CPU, elementwise over flat tensors: formulas in README.md.
#include <limits>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fastseg/arguments.h"
#include "fastseg/elementwise.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;

struct Problem {
  FlatView logits, targets;  // [n], of any floating types
  int64_t count;             // n
  double alpha, gamma;
};

// One vector of elements: missed = 1 - p_t, and the factors around it. squared: gamma is 2.
template <bool squared, typename scalar_t>
struct Focal {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  Sigmoid<scalar_t> sigmoid;
  vector_t t, missed, cross_entropy, alpha_t;
  accumulate_t gamma;

  FASTSEG_INLINE Focal(vector_t z, vector_t target, accumulate_t alpha, accumulate_t gamma)
      : sigmoid(z), t(target), gamma(gamma) {
    missed = sigmoid.p * (1 - t) + sigmoid.q * t;
    cross_entropy = ((1 - t) * z + sigmoid.hinge) + sigmoid.log_term;
    alpha_t = alpha >= 0 ? alpha * t + (1 - alpha) * (1 - t) : simd::splat(accumulate_t(1));
  }

  FASTSEG_INLINE vector_t modulation() const {
    if constexpr (squared) return missed * missed;
    const vector_t least = simd::splat(std::numeric_limits<accumulate_t>::min());  // not 0: least^0 is 1
    return simd::exp(gamma * simd::log(simd::select(missed < least, least, missed)));
  }
  FASTSEG_INLINE vector_t loss() const { return alpha_t * modulation() * cross_entropy; }

  // d/dz: missed^gamma (p - t) + gamma missed^(gamma - 1) p q (1 - 2 t) cross_entropy
  FASTSEG_INLINE vector_t derivative() const {
    const vector_t slope = sigmoid.p * (1 - t) - sigmoid.q * t;  // p - t, without cancellation
    const vector_t spread = gamma * sigmoid.p * sigmoid.q * (1 - 2 * t) * cross_entropy;
    if constexpr (squared) return alpha_t * missed * (missed * slope + spread);
    // 0 / 0 stands for its limit
    const vector_t ratio = simd::select(missed == vector_t{}, vector_t{}, spread / missed);
    return alpha_t * modulation() * (slope + ratio);
  }
};

// Calls use(slice, offset, count, values) for every chunk, with values [count] = what(focal) of its elements.
template <typename What, typename Use>
void for_each_element(const Problem& problem, const UnevenSlices& slices, const What& what, const Use& use) {
  with_digits_of(problem.logits, problem.targets, [&](auto zero) {
    using scalar_t = decltype(zero);
    using accumulate_t = simd::accumulate<scalar_t>;
    const auto alpha = static_cast<accumulate_t>(problem.alpha), gamma = static_cast<accumulate_t>(problem.gamma);
    const auto run = [&](auto squared) {
      for_each_chunk(problem.count, slices, [&](int64_t slice, int64_t offset, int count) {
        alignas(64) accumulate_t buffers[3][kChunk];
        const accumulate_t* z = read_chunk(problem.logits, offset, count, accumulate_t(0), buffers[0]);
        const accumulate_t* t = read_chunk(problem.targets, offset, count, accumulate_t(0), buffers[1]);
        for (int i = 0; i < count; i += kLanes) {
          const Focal<squared, scalar_t> focal(simd::load(z + i), simd::load(t + i), alpha, gamma);
          simd::store(buffers[2] + i, what(focal));
        }
        use(slice, offset, count, buffers[2]);
      });
    };
    problem.gamma == 2 ? run(std::true_type()) : run(std::false_type());
  });
}

Problem problem_of(const Tensor& inputs, const Tensor& targets, double alpha, double gamma) {
  for (const Tensor* tensor : {&inputs, &targets}) with_floating_type(*tensor, "inputs and targets", [](auto) {});
  const int64_t count = inputs.numel();
  return {flat_view(inputs, count, "inputs"), flat_view(targets, count, "targets"), count, alpha, gamma};
}

// loss: [n] of any floating type, or [] if `summed`.
void forward(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, bool summed, ScalarType,
             const Tensor& loss) {
  const Problem problem = problem_of(inputs, targets, alpha, gamma);
  const UnevenSlices slices = chunk_slices(ceil_divide(problem.count, kChunk));
  std::vector<double> partial(slices.slices(), 0.0);
  with_floating_type(loss, "loss", [](auto) {});
  use_huge_pages(loss);
  const FlatView losses = summed ? FlatView{} : flat_view(loss, problem.count, "loss");
  const auto loss_of = [](const auto& focal) FASTSEG_ALWAYS_INLINE { return focal.loss(); };
  for_each_element(problem, slices, loss_of, [&](int64_t slice, int64_t offset, int count, auto* values) {
    if (!summed) return write_chunk(values, count, losses, offset);
    LongSum<decltype(simd::load(values))> sum;
    std::fill(values + count, values + ceil_divide(count, kLanes) * kLanes, 0);
    for (int i = 0; i < count; i += kLanes) sum.add(simd::load(values + i));
    partial[slice] += sum.total();
  });
  if (summed) write_number(loss, std::accumulate(partial.begin(), partial.end(), 0.0), "loss");
}

// grad_loss: [n] or [] of any floating type; one number for all elements may also have stride 0.
void backward(const Tensor& inputs, const Tensor& targets, const Tensor& grad_loss, double alpha, double gamma,
              const Tensor& grad_inputs) {
  const Problem problem = problem_of(inputs, targets, alpha, gamma);
  FASTSEG_CHECK(grad_inputs.scalar_type() == inputs.scalar_type(), "grad_inputs must be like inputs");
  use_huge_pages(grad_inputs);
  const FlatView to = flat_view(grad_inputs, problem.count, "grad_inputs");
  if (problem.count == 0) return;
  const bool one_number = grad_loss.dim() == 0 || grad_loss.stride(0) == 0;
  const Tensor dense = one_number ? grad_loss : torch::stable::contiguous(grad_loss);
  const FlatView gradients = one_number ? FlatView{} : flat_view(dense, problem.count, "grad_loss");
  const double each = one_number ? first_number_of(grad_loss, "grad_loss") : 0;
  const UnevenSlices slices = chunk_slices(ceil_divide(problem.count, kChunk));
  const auto derivative_of = [](const auto& focal) FASTSEG_ALWAYS_INLINE { return focal.derivative(); };
  for_each_element(problem, slices, derivative_of, [&](int64_t, int64_t offset, int count, auto* values) {
    using accumulate_t = std::decay_t<decltype(*values)>;
    alignas(64) accumulate_t buffer[kChunk];
    const accumulate_t* grad = gradients ? read_chunk(gradients, offset, count, accumulate_t(0), buffer) : nullptr;
    for (int i = 0; i < count; i += kLanes) {
      const auto factor = grad ? simd::load(grad + i) : simd::splat(static_cast<accumulate_t>(each));
      simd::store(values + i, factor * simd::load(values + i));
    }
    write_chunk(values, count, to, offset);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_sigmoid_focal_loss", TORCH_BOX(&forward));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&backward));
}

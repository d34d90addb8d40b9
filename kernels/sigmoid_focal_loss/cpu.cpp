// Sigmoid focal loss on the CPU, elementwise over flat tensors: formulas in README.md.
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fastseg/arguments.h"
#include "fastseg/elementwise.h"
#include "fastseg/huge_pages.h"

namespace {

using namespace fastseg;

enum class Gamma { zero, two, any };

struct Problem {
  FlatView logits, targets;  // [n]
  int64_t count;             // n
  double alpha, gamma;
};

// One vector of elements: missed = 1 - p_t, and the factors around it.
template <Gamma gamma_kind, typename scalar_t>
struct Focal {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  Sigmoid<scalar_t> sigmoid;
  vector_t t, missed, cross_entropy, alpha_t;
  accumulate_t gamma;

  FASTSEG_INLINE Focal(vector_t z, vector_t target, accumulate_t alpha, accumulate_t gamma)
      : sigmoid(z), t(target), gamma(gamma) {
    missed = sigmoid.p * (1 - t) + sigmoid.q * t;
    cross_entropy = ((1 - t) * z + sigmoid.below) + sigmoid.rest;
    alpha_t = alpha >= 0 ? alpha * t + (1 - alpha) * (1 - t) : simd::splat(accumulate_t(1));
  }

  FASTSEG_INLINE vector_t modulation() const {
    if constexpr (gamma_kind == Gamma::zero) return simd::splat(accumulate_t(1));
    if constexpr (gamma_kind == Gamma::two) return missed * missed;
    return simd::exp(gamma * simd::log(missed));
  }
  FASTSEG_INLINE vector_t loss() const { return alpha_t * modulation() * cross_entropy; }

  // d/dz: missed^gamma (p - t) + gamma missed^(gamma - 1) p q (1 - 2 t) cross_entropy
  FASTSEG_INLINE vector_t derivative() const {
    const vector_t slope = sigmoid.p * (1 - t) - sigmoid.q * t;  // p - t, without cancellation
    if constexpr (gamma_kind == Gamma::zero) return alpha_t * slope;
    const vector_t spread = gamma * sigmoid.p * sigmoid.q * (1 - 2 * t) * cross_entropy;
    if constexpr (gamma_kind == Gamma::two) return alpha_t * missed * (missed * slope + spread);
    // 0 / 0 stands for its limit
    const vector_t ratio = simd::select(missed == vector_t{}, vector_t{}, spread / missed);
    return alpha_t * modulation() * (slope + ratio);
  }
};

// fn(std::integral_constant<Gamma, ...>)
template <typename Function>
void with_gamma(double gamma, const Function& fn) {
  if (gamma == 0) return fn(std::integral_constant<Gamma, Gamma::zero>());
  if (gamma == 2) return fn(std::integral_constant<Gamma, Gamma::two>());
  return fn(std::integral_constant<Gamma, Gamma::any>());
}

// Writes the losses to `losses` if it has data; returns their sum.
template <typename scalar_t>
double run_forward(const Problem& problem, FlatView losses) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  const UnevenSlices slices = chunk_slices(ceil_divide(problem.count, kChunk));
  std::vector<double> partial(slices.slices(), 0.0);
  with_gamma(problem.gamma, [&](auto kind) {
    for_each_chunk(problem.count, slices, [&](int64_t slice, int64_t offset, int count) {
      alignas(64) accumulate_t buffers[3][kChunk];
      const accumulate_t* z = read_chunk(problem.logits, offset, count, accumulate_t(0), buffers[0]);
      const accumulate_t* t = read_chunk(problem.targets, offset, count, accumulate_t(0), buffers[1]);
      for (int i = 0; i < count; i += kLanes) {
        const Focal<kind, scalar_t> focal(simd::load(z + i), simd::load(t + i), accumulate_t(problem.alpha),
                                          accumulate_t(problem.gamma));
        simd::store(buffers[2] + i, focal.loss());
      }
      if (losses) {
        write_chunk(buffers[2], count, losses, offset);
        return;
      }
      LongSum<vector_t> sum;
      std::fill(buffers[2] + count, buffers[2] + ceil_divide(count, kLanes) * kLanes, accumulate_t(0));
      for (int i = 0; i < count; i += kLanes) sum.add(simd::load(buffers[2] + i));
      partial[slice] += sum.total();
    });
  });
  double total = 0;
  for (double sum : partial) total += sum;
  return total;
}

// grad_loss has data (one number per element), or every element has the gradient grad_each.
template <typename scalar_t>
void run_backward(const Problem& problem, FlatView grad_loss, double grad_each, FlatView gradient) {
  using accumulate_t = simd::accumulate<scalar_t>;
  with_gamma(problem.gamma, [&](auto kind) {
    for_each_chunk(
        problem.count, chunk_slices(ceil_divide(problem.count, kChunk)), [&](int64_t, int64_t offset, int count) {
          alignas(64) accumulate_t buffers[4][kChunk];
          const accumulate_t* z = read_chunk(problem.logits, offset, count, accumulate_t(0), buffers[0]);
          const accumulate_t* t = read_chunk(problem.targets, offset, count, accumulate_t(0), buffers[1]);
          const accumulate_t* grad =
              grad_loss ? read_chunk(grad_loss, offset, count, accumulate_t(0), buffers[2]) : nullptr;
          for (int i = 0; i < count; i += kLanes) {
            const Focal<kind, scalar_t> focal(simd::load(z + i), simd::load(t + i), accumulate_t(problem.alpha),
                                                  accumulate_t(problem.gamma));
            const auto factor = grad ? simd::load(grad + i) : simd::splat(accumulate_t(grad_each));
            simd::store(buffers[3] + i, factor * focal.derivative());
          }
          write_chunk(buffers[3], count, gradient, offset);
        });
  });
}

// --- entry points ---

void check_floating(const Tensor& tensor, const char* name) {
  with_floating_type(tensor, name, [](auto) {});
}

Problem problem_of(const Tensor& inputs, const Tensor& targets, double alpha, double gamma) {
  check_floating(inputs, "inputs");
  check_floating(targets, "targets");
  const int64_t count = inputs.numel();
  return {flat_view(inputs, count, "inputs"), flat_view(targets, count, "targets"), count, alpha, gamma};
}

// loss: [n] of any floating type, or [] of the accumulator's if `summed`.
void forward(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, bool summed, ScalarType,
             const Tensor& loss) {
  const Problem problem = problem_of(inputs, targets, alpha, gamma);
  check_floating(loss, "loss");
  use_huge_pages(loss);
  const FlatView losses = summed ? FlatView{} : flat_view(loss, problem.count, "loss");
  if (!summed && problem.count == 0) return;
  const double sum = with_digits_of(
      problem.logits, problem.targets, [&](auto zero) { return run_forward<decltype(zero)>(problem, losses); });
  if (summed) write_number(loss, sum, "loss");
}

// grad_loss: [n] or [] of any floating type; one number for all elements may also have stride 0.
void backward(const Tensor& inputs, const Tensor& targets, const Tensor& grad_loss, double alpha, double gamma,
              const Tensor& grad_inputs) {
  const Problem problem = problem_of(inputs, targets, alpha, gamma);
  check_floating(grad_inputs, "grad_inputs");
  use_huge_pages(grad_inputs);
  const FlatView to = flat_view(grad_inputs, problem.count, "grad_inputs");
  if (problem.count == 0) return;
  check_floating(grad_loss, "grad_loss");
  const bool one_number = grad_loss.dim() == 0 || grad_loss.stride(0) == 0;
  FASTSEG_CHECK(grad_loss.is_cpu() && (grad_loss.dim() == 0 || grad_loss.numel() == problem.count),
                "grad_loss must be a CPU tensor [] or [n]");
  const Tensor dense = one_number ? grad_loss : torch::stable::contiguous(grad_loss);
  const FlatView per_element = one_number ? FlatView{} : flat_view(dense, problem.count, "grad_loss");
  double buffer[kLanes];
  const double grad_each = one_number ? *read_chunk({dense.data_ptr(), dense.scalar_type()}, 0, 1, 0.0, buffer) : 0;
  with_digits_of(problem.logits, problem.targets,
                 [&](auto zero) { run_backward<decltype(zero)>(problem, per_element, grad_each, to); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_sigmoid_focal_loss", TORCH_BOX(&forward));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&backward));
}

// max_unpool2d on the CPU: pooled values to their pixels, and the gradient. Formulas and measurements: README.md.
#include <stdexcept>

#include <torch/csrc/stable/library.h>

#include "fastseg/huge_pages.h"
#include "pooling/quads.h"
#include "pooling/row_streams.h"
#include "pooling/scatter.h"
#include "pooling/windows.h"

namespace fastseg::pooling {
namespace {

[[noreturn]] void refuse_offsets() {
  throw std::runtime_error(
      "fastseg.ops.max_unpool2d: indices holds an offset that is no pixel of its window; allowed: the indices of "
      "a pooling with this geometry");
}

// Calls body(quads) if int64 indices can come from a pooling with 2x2 windows without overlap, as most do. Returns what
// body does, whether all of them fit such windows; if not, the caller must write everything again.
template <typename Body>
bool as_quads(const Tensor& image, const Tensor& pooled, const Tensor& indices, const Planes& planes,
              const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const Body& body) {
  using Pair = std::vector<int64_t>;
  constexpr int64_t kWidest = int64_t{1} << 30;  // labels have 32 bits
  if (kernel_size != Pair{2, 2} || stride != Pair{2, 2} || padding != Pair{0, 0} || dilation != Pair{1, 1} ||
      image.size(2) < 2 * pooled.size(2) || image.size(3) < 2 * pooled.size(3) || image.size(3) >= kWidest) {
    return false;
  }
  const Windows windows = windows_of(image, pooled, indices, kernel_size, stride, padding, dilation);
  bool fits = are_quads(windows, planes);
  if (fits) with_quads(windows, planes, [&](const auto& quads) { fits = body(quads); });
  return fits;
}

void forward(const Tensor& input, const Tensor& indices, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
             std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> /*size*/,
             const Tensor& output) {
  if (output.numel() == 0) return;
  const Planes planes = planes_of(output, input, indices);
  use_huge_pages(output);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* pooled = input.const_data_ptr<scalar_t>();
    scalar_t* image = output.mutable_data_ptr<scalar_t>();
    if (indices.scalar_type() == ScalarType::Long) {
      const auto spread = [&](const auto& quads) {
        return spread_quads(pooled, indices.const_data_ptr<int64_t>(), image, quads);
      };
      if (as_quads(output, input, indices, planes, kernel_size, stride, padding, dilation, spread)) return;
      Outside outside;
      scatter<Last, scalar_t>(input, indices, output, nullptr, planes, outside);
      outside.check(output.size(2), output.size(3));
      return;
    }
    const Windows windows = windows_of(output, input, indices, kernel_size, stride, padding, dilation);
    const uint8_t* offsets = indices.const_data_ptr<uint8_t>();
    if (are_quads(windows, planes)) {
      with_quads(windows, planes, [&](const auto& quads) {
        if (!spread_quads(pooled, offsets, image, quads)) refuse_offsets();
      });
      return;
    }
    Outside outside;
    scatter<Last, scalar_t>(input, indices, output, &windows, planes, outside);
    if (outside.any()) refuse_offsets();
  });
}

void backward(const Tensor& grad_output, const Tensor& indices, std::vector<int64_t> kernel_size,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
              const Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  const Planes planes = planes_of(grad_output, grad_input, indices);
  use_huge_pages(grad_input);
  with_floating_type(grad_output, "grad_output", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* image = grad_output.const_data_ptr<scalar_t>();
    scalar_t* pooled = grad_input.mutable_data_ptr<scalar_t>();
    if (indices.scalar_type() == ScalarType::Long) {
      const auto choose = [&](const auto& quads) {
        return choose_quads(image, indices.const_data_ptr<int64_t>(), pooled, quads);
      };
      if (as_quads(grad_output, grad_input, indices, planes, kernel_size, stride, padding, dilation, choose)) return;
      Outside outside;
      gather<int64_t, scalar_t>(grad_output, indices, grad_input, nullptr, planes, outside);
      outside.check(grad_output.size(2), grad_output.size(3));
      return;
    }
    const Windows windows = windows_of(grad_output, grad_input, indices, kernel_size, stride, padding, dilation);
    const uint8_t* offsets = indices.const_data_ptr<uint8_t>();
    if (are_quads(windows, planes)) {
      with_quads(windows, planes, [&](const auto& quads) {
        if (!choose_quads(image, offsets, pooled, quads)) refuse_offsets();
      });
      return;
    }
    Outside outside;
    gather<uint8_t, scalar_t>(grad_output, indices, grad_input, &windows, planes, outside);
    if (outside.any()) refuse_offsets();
  });
}

}  // namespace
}  // namespace fastseg::pooling

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_max_unpool2d", TORCH_BOX(&fastseg::pooling::forward));
  m.impl("_max_unpool2d_backward", TORCH_BOX(&fastseg::pooling::backward));
}

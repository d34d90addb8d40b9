// The depthwise maps on the CPU: convolution, transposed convolution and the gradient of their weight. Formulas and
// measurements: README.md.
#include <torch/csrc/stable/library.h>

#include "convolution/depthwise_pixels.h"
#include "convolution/depthwise_planes.h"
#include "fastseg/huge_pages.h"

namespace fastseg::depthwise {
namespace {

using MakeAxis = decltype(&Axis::convolution);

Map map_of(const Tensor& input, const Tensor& output, const Pair& kernel_size, const Pair& stride, const Pair& padding,
           const Pair& dilation, int64_t groups, MakeAxis make_axis, const char* name) {
  FASTSEG_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                "kernel_size, stride, padding and dilation must be pairs");
  check_image(input, input.scalar_type(), "input");
  check_image(output, input.scalar_type(), name);
  FASTSEG_CHECK(output.size(0) == input.size(0) && output.size(1) == input.size(1) && groups == input.size(1), name,
                " must have the images and channels of input, a group each");
  const auto axis = [&](int64_t i) {
    return make_axis(kernel_size[i], input.size(2 + i), output.size(2 + i), stride[i], padding[i], dilation[i]);
  };
  return {input.size(0), input.size(1), axis(0), axis(1), check_formats(input, output, name)};
}

void run_map(MakeAxis make_axis, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, const Pair& stride, const Pair& padding, const Pair& dilation,
             int64_t groups, bool relu, const Tensor& output) {
  if (output.numel() == 0) return;
  FASTSEG_CHECK(weight.dim() == 4, "weight must be [C, 1, R, S]");
  const Pair kernel_size{weight.size(2), weight.size(3)};
  const Map map = map_of(input, output, kernel_size, stride, padding, dilation, groups, make_axis, "output");
  use_huge_pages(output);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Epilogue<scalar_t> epilogue(bias, residual, output, relu);
    const auto weights = gathered_weights<scalar_t>(weight, map, /*by_tap=*/map.channels_last);
    const auto run = map.channels_last ? &map_pixels<scalar_t> : &map_planes<scalar_t>;
    run(map, input.const_data_ptr<scalar_t>(), weights, epilogue, output.mutable_data_ptr<scalar_t>());
  });
}

void convolution(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                 Pair stride, Pair padding, Pair dilation, int64_t groups, Pair /*size*/, bool relu,
                 const Tensor& output) {
  run_map(&Axis::convolution, input, weight, bias, residual, stride, padding, dilation, groups, relu, output);
}

void transposed(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                Pair stride, Pair padding, Pair dilation, int64_t groups, Pair /*size*/, bool relu,
                const Tensor& output) {
  run_map(&Axis::transposed, input, weight, bias, residual, stride, padding, dilation, groups, relu, output);
}

void grad_weight(const Tensor& input, const Tensor& grad_output, Pair stride, Pair padding, Pair dilation,
                 int64_t groups, Pair kernel_size, bool /*channels_last*/, const Tensor& grad_weight) {
  const Map map =
      map_of(input, grad_output, kernel_size, stride, padding, dilation, groups, &Axis::convolution, "grad_output");
  check_image(grad_weight, input.scalar_type(), "grad_weight");
  FASTSEG_CHECK(grad_weight.size(0) == map.channels && grad_weight.size(1) == 1 &&
                    grad_weight.size(2) == map.rows.kernel && grad_weight.size(3) == map.columns.kernel,
                "grad_weight must be [C, 1, R, S]");
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto run = map.channels_last ? &sum_weights_of_pixels<scalar_t> : &sum_weights_of_planes<scalar_t>;
    const std::vector<double> sums = run(map, input.const_data_ptr<scalar_t>(), grad_output.const_data_ptr<scalar_t>());
    const int64_t channel_stride = map.channels_last ? 1 : map.taps();
    const int64_t tap_stride = map.channels_last ? padded(map.channels) : 1;
    write_grad_weight<scalar_t>(sums.data(), channel_stride, tap_stride, map, grad_weight);
  });
}

}  // namespace
}  // namespace fastseg::depthwise

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_depthwise_dilated_conv2d", TORCH_BOX(&fastseg::depthwise::convolution));
  m.impl("_depthwise_conv_transpose2d", TORCH_BOX(&fastseg::depthwise::transposed));
  m.impl("_depthwise_conv2d_grad_weight", TORCH_BOX(&fastseg::depthwise::grad_weight));
}

// Bilinear upsampling and the bilinear transposed convolution on the CPU, forward and backward: method in README.md.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/arguments.h"
#include "fastseg/check.h"
#include "fastseg/huge_pages.h"
#include "fastseg/layout.h"
#include "upsample_bilinear2d/backward.h"
#include "upsample_bilinear2d/forward.h"

namespace fastseg::upsample_bilinear2d {
namespace {

constexpr int64_t kLongest = int64_t{1} << 30;  // columns and rows are counted in 32 bits

bool is_dense(const Tensor& tensor, bool channels_last) {
  return channels_last ? is_channels_last(tensor) : tensor.is_contiguous();
}

// The tensor with memory [N, H, W, C] if channels_last, else [N, C, H, W]: itself or a copy.
Tensor dense(const Tensor& tensor, bool channels_last) {
  if (is_dense(tensor, channels_last)) return tensor;
  if (!channels_last) return torch::stable::contiguous(tensor);
  return torch::stable::contiguous(torch::stable::transpose(torch::stable::transpose(tensor, 1, 2), 2, 3));
}

void check(const Tensor& source, const Tensor& output, const Tensor& written, bool channels_last) {
  for (const Tensor* tensor : {&source, &output}) {
    FASTSEG_CHECK(tensor->is_cpu() && tensor->dim() == 4, "images must be [N, C, H, W] on the CPU");
    for (const int64_t size : {tensor->size(2), tensor->size(3)}) {
      FASTSEG_CHECK(size > 0 && size < kLongest, "height and width must be 1 to 2^30 - 1");
    }
  }
  FASTSEG_CHECK(source.size(0) == output.size(0) && source.size(1) == output.size(1) && source.size(1) > 0,
                "images must have the same N and C, and a channel");
  FASTSEG_CHECK(source.scalar_type() == output.scalar_type(), "images must have the same dtype");
  FASTSEG_CHECK(is_dense(written, channels_last), "what is written must be dense in the memory format asked for");
}

// axis(dim, source size, output size) describes height (0) and width (1).
template <typename Describe>
Problem describe(const Tensor& source, const Tensor& output, bool channels_last, const Describe& axis) {
  const int64_t images = source.size(0), channels = source.size(1);
  return {channels_last ? images : images * channels, channels_last ? channels : 1,
          axis(0, source.size(2), output.size(2)), axis(1, source.size(3), output.size(3))};
}

bool is_streamed(const Tensor& written) { return written.numel() * written.element_size() >= kStreamedBytes; }

// Calls fn(scalar_t{}) for fp32 and the half types.
template <typename Function>
void with_type(const Tensor& tensor, const Function& fn) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return fn(float{});
  if (type == ScalarType::Half) return fn(simd::Half{});
  FASTSEG_CHECK(type == ScalarType::BFloat16, "images must be float32, float16 or bfloat16");
  fn(simd::BFloat16{});
}

template <typename Describe>
void forward(const Tensor& input, bool channels_last, const Tensor& output, const Describe& axis) {
  check(input, output, output, channels_last);
  if (input.size(0) == 0) return;
  use_huge_pages(output);
  const Tensor source = dense(input, channels_last);
  const Problem problem = describe(input, output, channels_last, axis);
  with_type(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* from = source.template const_data_ptr<scalar_t>();
    Forward<scalar_t>(problem, from, output.template mutable_data_ptr<scalar_t>(), is_streamed(output)).run();
  });
}

template <typename Describe>
void backward(const Tensor& grad_output, bool channels_last, const Tensor& grad_input, const Describe& axis) {
  check(grad_input, grad_output, grad_input, channels_last);
  if (grad_input.size(0) == 0) return;
  use_huge_pages(grad_input);
  const Tensor gradient = dense(grad_output, channels_last);
  const Problem problem = describe(grad_input, grad_output, channels_last, axis);
  with_type(grad_input, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* from = gradient.template const_data_ptr<scalar_t>();
    Backward<scalar_t>(problem, from, grad_input.template mutable_data_ptr<scalar_t>(), is_streamed(grad_input)).run();
  });
}

auto interpolating(const std::optional<std::vector<double>>& scales, bool align_corners) {
  FASTSEG_CHECK(!scales.has_value() || scales->size() == 2, "scales must be two numbers");
  return [&scales, align_corners](int dim, int64_t source, int64_t output) {
    return interpolating_axis(source, output, align_corners, scales.has_value() ? scales->at(dim) : 0.0);
  };
}

auto deconvolving(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding) {
  for (const auto* pair : {&kernel_size, &stride, &padding}) {
    FASTSEG_CHECK(pair->size() == 2, "kernel_size, stride and padding must be two numbers each");
  }
  FASTSEG_CHECK(stride[0] > 0 && stride[1] > 0, "stride must be positive");
  return [&](int dim, int64_t source, int64_t output) {
    return deconvolving_axis(source, output, kernel_size[dim], stride[dim], padding[dim]);
  };
}

void upsample(const Tensor& input, std::vector<int64_t>, std::optional<std::vector<double>> scales, bool align_corners,
              bool channels_last, const Tensor& output) {
  forward(input, channels_last, output, interpolating(scales, align_corners));
}

void upsample_backward(const Tensor& grad_output, std::vector<int64_t>, std::optional<std::vector<double>> scales,
                       bool align_corners, bool channels_last, const Tensor& grad_input) {
  backward(grad_output, channels_last, grad_input, interpolating(scales, align_corners));
}

void conv_transpose(const Tensor& input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t>, bool channels_last, const Tensor& output) {
  forward(input, channels_last, output, deconvolving(kernel_size, stride, padding));
}

void conv_transpose_backward(const Tensor& grad_output, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                             std::vector<int64_t> padding, std::vector<int64_t>, bool channels_last,
                             const Tensor& grad_input) {
  backward(grad_output, channels_last, grad_input, deconvolving(kernel_size, stride, padding));
}

}  // namespace
}  // namespace fastseg::upsample_bilinear2d

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  using namespace fastseg::upsample_bilinear2d;
  m.impl("_upsample_bilinear2d", TORCH_BOX(&upsample));
  m.impl("_upsample_bilinear2d_backward", TORCH_BOX(&upsample_backward));
  m.impl("_bilinear_conv_transpose2d", TORCH_BOX(&conv_transpose));
  m.impl("_bilinear_conv_transpose2d_backward", TORCH_BOX(&conv_transpose_backward));
}

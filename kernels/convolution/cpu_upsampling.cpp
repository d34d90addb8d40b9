// Entry points of upsampling.h: dense transposed convolutions of a large stride and their transposes, NCHW.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "convolution/epilogue.h"
#include "convolution/upsampling.h"
#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"

namespace fastseg::upsampling {
namespace {

constexpr int64_t kStreamedBytes = 8 << 20;  // outputs from here on bypass the cache

using convolution::Epilogue;
using Numbers = std::vector<int64_t>;

void check_image(const Tensor& tensor, const Tensor& like, const char* name) {
  FASTSEG_CHECK(
      tensor.is_cpu() && tensor.dim() == 4 && tensor.is_contiguous() && tensor.scalar_type() == like.scalar_type(),
      name, " must be a contiguous CPU tensor of four dimensions and of the dtype of input");
}

// small [N, S, h, w], big [N, B, H, W], weight [S, B, kh, kw].
Shape describe(const Tensor& small, const Tensor& big, const Tensor& weight, const Numbers& stride,
               const Numbers& padding, const Numbers& dilation, int64_t groups) {
  FASTSEG_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                "stride, padding and dilation must be pairs");
  check_image(small, small, "input");
  check_image(big, small, "output");
  FASTSEG_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.scalar_type() == small.scalar_type(),
                "weight must be a CPU tensor of four dimensions and of the dtype of input");
  const Shape shape{small.size(0),  small.size(1),  big.size(1), small.size(2), small.size(3), big.size(2), big.size(3),
                    weight.size(2), weight.size(3), stride[0],   stride[1],     padding[0],    padding[1]};
  FASTSEG_CHECK(
      big.size(0) == shape.images && weight.size(0) == shape.small_channels && weight.size(1) == shape.big_channels,
      "input, output and weight do not fit together");
  const int64_t step = shape.stride_width;
  FASTSEG_CHECK(groups == 1 && dilation[0] == 1 && dilation[1] == 1 && shape.stride_height > 0 && shape.top >= 0 &&
                    shape.left >= 0 && (step == 2 || step == 4 || step == 8 || step == 16 || step == 32),
                "stride must be 2, 4, 8, 16 or 32, dilation and groups 1");
  return shape;
}

// An output element from its sum.
template <typename scalar_t>
scalar_t finished(const Epilogue<scalar_t>& epilogue, int64_t n, int64_t c, int64_t y, int64_t x,
                  simd::accumulate<scalar_t> sum) {
  using accumulate_t = simd::accumulate<scalar_t>;
  sum += epilogue.bias_of(c);
  if (epilogue.residual.data) sum += accumulate_t(*epilogue.residual.at(n, c, y, x));
  return scalar_t(epilogue.relu && sum < 0 ? accumulate_t(0) : sum);
}

// The same for `width` sums of a row. past_cache requires `to` aligned to cache lines and whole vectors.
template <typename scalar_t>
void write_row(const Epilogue<scalar_t>& epilogue, int64_t n, int64_t c, int64_t y, int64_t width,
               const simd::accumulate<scalar_t>* sums, scalar_t* to, bool past_cache) {
  const auto& residual = epilogue.residual;
  const bool vectors = !residual.data || residual.column == 1;
  const scalar_t* added = residual.data ? residual.at(n, c, y, 0) : nullptr;
  const auto bias = epilogue.bias_of(c);
  int64_t x = 0;
  for (; vectors && x + simd::kLanes <= width; x += simd::kLanes) {
    auto lanes = simd::load(sums + x) + bias;
    if (added) lanes += simd::load(added + x);
    lanes = epilogue.rectified(lanes);
    past_cache ? simd::stream(to + x, lanes) : simd::store(to + x, lanes);
  }
  for (; x < width; ++x) to[x] = finished(epilogue, n, c, y, x, sums[x]);
}

void conv_transpose2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, Numbers stride, Numbers padding, Numbers dilation,
                      int64_t groups, Numbers, bool relu, const Tensor& output) {
  const Shape shape = describe(input, output, weight, stride, padding, dilation, groups);
  FASTSEG_CHECK(weight.is_contiguous(), "weight must be contiguous");
  if (output.numel() == 0) return;
  use_huge_pages(output);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Epilogue<scalar_t> epilogue(bias, residual, output, relu);
    scalar_t* const to = output.mutable_data_ptr<scalar_t>();
    const bool past_cache = output.numel() * int64_t(sizeof(scalar_t)) >= kStreamedBytes &&
                            shape.big_width % simd::kLanes == 0 && simd::is_aligned(to);
    spread(shape, input.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
           [&](int64_t n, int64_t c, int64_t row, const auto* sums) {
             scalar_t* const at = to + ((n * shape.big_channels + c) * shape.big_height + row) * shape.big_width;
             write_row(epilogue, n, c, row, shape.big_width, sums, at, past_cache);
           });
    simd::stream_fence();
  });
}

void dilated_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, Numbers stride, Numbers padding, Numbers dilation,
                    int64_t groups, Numbers, bool relu, const Tensor& output) {
  const Shape shape = describe(output, input, weight, stride, padding, dilation, groups);
  FASTSEG_CHECK(weight.is_contiguous(), "weight must be contiguous");
  if (output.numel() == 0) return;
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Epilogue<scalar_t> epilogue(bias, residual, output, relu);
    scalar_t* const to = output.mutable_data_ptr<scalar_t>();
    collect(shape, input.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
            [&](int64_t n, int64_t c, int64_t row, int64_t column, auto sum) {
              const int64_t plane = (n * shape.small_channels + c) * shape.small_height;
              to[(plane + row) * shape.small_width + column] = finished(epilogue, n, c, row, column, sum);
            });
  });
}

void conv2d_grad_weight(const Tensor& input, const Tensor& grad_output, Numbers stride, Numbers padding,
                        Numbers dilation, int64_t groups, Numbers, bool, const Tensor& grad_weight) {
  const Shape shape = describe(grad_output, input, grad_weight, stride, padding, dilation, groups);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* const to = grad_weight.mutable_data_ptr<scalar_t>();
    const int64_t strides[] = {grad_weight.stride(0), grad_weight.stride(1), grad_weight.stride(2),
                               grad_weight.stride(3)};
    correlate(shape, grad_output.const_data_ptr<scalar_t>(), input.const_data_ptr<scalar_t>(),
              [&](int64_t s, int64_t b, int64_t r, int64_t tap, auto sum) {
                to[s * strides[0] + b * strides[1] + r * strides[2] + tap * strides[3]] = scalar_t(sum);
              });
  });
}

}  // namespace
}  // namespace fastseg::upsampling

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_upsampling_conv_transpose2d", TORCH_BOX(&fastseg::upsampling::conv_transpose2d));
  m.impl("_upsampling_dilated_conv2d", TORCH_BOX(&fastseg::upsampling::dilated_conv2d));
  m.impl("_upsampling_conv2d_grad_weight", TORCH_BOX(&fastseg::upsampling::conv2d_grad_weight));
}

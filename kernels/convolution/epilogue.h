// Bias, residual and relu of the convolutions in C++.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "fastseg/arguments.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace fastseg::convolution {

inline void check_image(const Tensor& image, ScalarType type, const char* name) {
  FASTSEG_CHECK(image.is_cpu() && image.dim() == 4 && image.scalar_type() == type, name,
                " must be a CPU tensor [N, C, H, W] of the dtype of input");
}

// A strided [N, C, H, W] image that is only read.
template <typename scalar_t>
struct ImageView {
  const scalar_t* data = nullptr;
  int64_t image = 0, channel = 0, row = 0, column = 0;  // strides

  ImageView() = default;
  explicit ImageView(const Tensor& tensor) : data(tensor.const_data_ptr<scalar_t>()) {
    const auto strides = tensor.strides();
    image = strides[0], channel = strides[1], row = strides[2], column = strides[3];
  }
  const scalar_t* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * image + c * channel + y * row + x * column;
  }
};

// Whole vectors of 16 channels.
inline int64_t padded(int64_t channels) { return ceil_divide(channels, simd::kLanes) * simd::kLanes; }

// What is done to the sums, in this order: bias, residual, relu.
template <typename scalar_t>
struct Epilogue {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  std::vector<accumulate_t> bias;  // [padded(C)], or nothing
  ImageView<scalar_t> residual;    // [N, C, OH, OW], data is null if there is none
  bool relu;

  Epilogue(const std::optional<Tensor>& bias_values, const std::optional<Tensor>& residual_image, const Tensor& output,
           bool relu)
      : relu(relu) {
    const int64_t channels = output.size(1);
    if (bias_values) {
      FASTSEG_CHECK(bias_values->is_cpu() && bias_values->scalar_type() == scalar_type_of<scalar_t>() &&
                        bias_values->dim() == 1 && bias_values->size(0) == channels,
                    "bias must be a CPU tensor of one element per channel, of the dtype of input");
      const scalar_t* values = bias_values->const_data_ptr<scalar_t>();
      bias.resize(padded(channels));
      for (int64_t c = 0; c < channels; ++c) {
        bias[c] = static_cast<accumulate_t>(values[c * bias_values->stride(0)]);
      }
    }
    if (residual_image) {
      check_image(*residual_image, scalar_type_of<scalar_t>(), "residual");
      for (int64_t dim = 0; dim < 4; ++dim) {
        FASTSEG_CHECK(residual_image->size(dim) == output.size(dim), "residual must have the shape of the output");
      }
      residual = ImageView<scalar_t>(*residual_image);
    }
  }

  accumulate_t bias_of(int64_t channel) const { return bias.empty() ? accumulate_t(0) : bias[channel]; }
  FASTSEG_INLINE vector_t rectified(vector_t sums) const {
    return relu ? simd::select(sums < vector_t{}, vector_t{}, sums) : sums;  // NaN stays
  }
};

}  // namespace fastseg::convolution

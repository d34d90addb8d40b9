// From stable-ABI tensors to the pointers of pixel_tile.h. Only what memory safety needs is checked: everything else
// was checked in Python.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/pixel_tile.h"

namespace fastseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename value_t>
constexpr ScalarType scalar_type_of() {
  if (std::is_same_v<value_t, float>) return ScalarType::Float;
  if (std::is_same_v<value_t, double>) return ScalarType::Double;
  if (std::is_same_v<value_t, simd::Half>) return ScalarType::Half;
  return ScalarType::BFloat16;
}

// fn(scalar_t{}) for the four storage types.
template <typename Function>
auto with_floating_type(const Tensor& tensor, const char* name, const Function& fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Double:
      return fn(double{});
    case ScalarType::Half:
      return fn(simd::Half{});
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name,
                      " must be float32, float64, float16 or bfloat16");
      return fn(simd::BFloat16{});
  }
}

// The values of a contiguous CPU tensor of `count` elements.
template <typename value_t>
const value_t* dense_values(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == scalar_type_of<value_t>() && tensor.is_contiguous() &&
                      tensor.numel() == count,
                  name, " must be a contiguous CPU tensor of the accumulator's dtype with ", count, " elements");
  return tensor.const_data_ptr<value_t>();
}

template <typename value_t>
const value_t* dense_values(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor ? dense_values<value_t>(*tensor, count, name) : nullptr;
}

// The same of an output.
template <typename value_t>
value_t* dense_output(const Tensor& tensor, int64_t count, const char* name) {
  dense_values<value_t>(tensor, count, name);
  return tensor.mutable_data_ptr<value_t>();
}

// A tensor () of `type` on the device of `like`.
inline Tensor scalar(const Tensor& like, double value, ScalarType type = ScalarType::Double) {
  Tensor tensor = torch::stable::new_empty(like, std::vector<int64_t>{}, type);
  with_floating_type(tensor, "dtype", [&](auto zero) {
    using scalar_t = decltype(zero);
    *tensor.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(static_cast<simd::accumulate<scalar_t>>(value));
  });
  return tensor;
}

// The one element of a tensor of any floating type.
inline double number_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, name, " must be a CPU tensor of one element");
  return with_floating_type(tensor, name, [&](auto zero) -> double {
    using scalar_t = decltype(zero);
    return static_cast<simd::accumulate<scalar_t>>(*tensor.const_data_ptr<scalar_t>());
  });
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// A [N, C, P] tensor that can be walked in tiles: classes or pixels lie side by side.
inline bool is_pixel_view(const Tensor& tensor) {
  return tensor.dim() == 3 &&
         (tensor.stride(1) == 1 || tensor.stride(2) == 1 || tensor.size(1) <= 1 || tensor.size(2) <= 1);
}

template <typename scalar_t>
PixelView<scalar_t> pixel_view(const Tensor& tensor, scalar_t* data) {
  STD_TORCH_CHECK(tensor.is_cpu() && is_pixel_view(tensor), "not a [N, C, P] view of pixels on the CPU");
  const auto stride = [&](int64_t dimension) {  // of one element or none a stride means nothing
    return tensor.size(dimension) <= 1 ? 1 : tensor.stride(dimension);
  };
  return {data, tensor.stride(0), stride(1), stride(2)};
}

// `target` is contiguous, [N, P].
inline LabelView label_view(const Tensor& target, int64_t count, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.is_cpu() && target.is_contiguous() && target.numel() == count,
                  "target must be a contiguous CPU tensor with ", count, " labels");
  STD_TORCH_CHECK(classes >= 1 && classes <= INT32_MAX, "input must have 1 to 2^31 - 1 classes");
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

}  // namespace fastseg

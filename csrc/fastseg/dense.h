// Contiguous CPU tensors as pointers to their values. Checks only what memory safety needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/check.h"
#include "fastseg/simd.h"

namespace fastseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Dtype {
  ScalarType type;
  const char* name;
};

template <typename value_t>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<value_t, float>) return {ScalarType::Float, "float32"};
  else if constexpr (std::is_same_v<value_t, double>) return {ScalarType::Double, "float64"};
  else if constexpr (std::is_same_v<value_t, simd::Half>) return {ScalarType::Half, "float16"};
  else if constexpr (std::is_same_v<value_t, simd::BFloat16>) return {ScalarType::BFloat16, "bfloat16"};
  else if constexpr (std::is_same_v<value_t, int64_t>) return {ScalarType::Long, "int64"};
  else if constexpr (std::is_same_v<value_t, int32_t>) return {ScalarType::Int, "int32"};
  else if constexpr (std::is_same_v<value_t, bool>) return {ScalarType::Bool, "bool"};
  else {
    static_assert(std::is_same_v<value_t, uint8_t>);
    return {ScalarType::Byte, "uint8"};
  }
}

template <typename value_t>
constexpr ScalarType scalar_type_of() {
  return dtype_of<value_t>().type;
}

// The values of a contiguous CPU tensor of `count` elements.
template <typename value_t>
const value_t* dense_values(const Tensor& tensor, int64_t count, const char* name) {
  constexpr Dtype dtype = dtype_of<value_t>();
  FASTSEG_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == dtype.type && tensor.is_contiguous() && tensor.numel() == count, name,
      " must be a contiguous ", dtype.name, " CPU tensor with ", count, " elements");
  return tensor.const_data_ptr<value_t>();
}

template <typename value_t>
const value_t* dense_values(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor ? dense_values<value_t>(*tensor, count, name) : nullptr;
}

// The same for an output.
template <typename value_t>
value_t* dense_output(const Tensor& tensor, int64_t count, const char* name) {
  dense_values<value_t>(tensor, count, name);
  return tensor.mutable_data_ptr<value_t>();
}

// The same for an output that kernels add to: fills it with 0.
template <typename value_t>
value_t* zeroed_output(const Tensor& tensor, int64_t count, const char* name) {
  value_t* values = dense_output<value_t>(tensor, count, name);
  std::fill_n(values, count, value_t(0));
  return values;
}

}  // namespace fastseg

// Queries of memory layouts that the stable ABI lacks at torch 2.11.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace fastseg {

// Whether [N, C, *spatial] is stored densely as [N, *spatial, C]. Strides of dimensions of size 1 do not
// matter.
inline bool is_channels_last(const torch::stable::Tensor& tensor) {
  int64_t expected = 1;
  const auto is_dense = [&](int64_t dimension) {
    const bool fits = tensor.size(dimension) == 1 || tensor.stride(dimension) == expected;
    expected *= tensor.size(dimension);
    return fits;
  };
  bool fits = is_dense(1);
  for (int64_t dimension = tensor.dim() - 1; dimension >= 2; --dimension) fits = fits && is_dense(dimension);
  return fits && is_dense(0);
}

}  // namespace fastseg

// Checks of the arguments of nms and soft_nms on CUDA, for memory safety.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "cuda/host.h"

namespace fastseg::cuda {

// Checks the inputs and returns the number of boxes.
inline int64_t check_boxes(const char* op, const Tensor& boxes, const Tensor& scores,
                           const std::optional<Tensor>& idxs) {
  const int64_t count = scores.numel();
  FASTSEG_CHECK(boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double, "fastseg::", op,
                ": boxes must be float32 or float64");
  FASTSEG_CHECK(scores.dim() == 1 && count < INT32_MAX, "fastseg::", op, ": scores must be (N,), N < 2^31 - 1");
  check_list(op, boxes, boxes, "boxes", boxes.scalar_type(), 4 * count);
  check_list(op, boxes, scores, "scores", boxes.scalar_type(), count);
  if (idxs) check_list(op, boxes, *idxs, "idxs", ScalarType::Long, count);
  return count;
}

// Calls body(a value of the boxes' type).
template <typename Body>
cudaError_t with_real_type(const Tensor& boxes, const Body& body) {
  return boxes.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

}  // namespace fastseg::cuda

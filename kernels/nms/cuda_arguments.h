// Checks of the arguments of nms and soft_nms on CUDA, for memory safety.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "cuda/host.h"

namespace fastseg::cuda {

inline void check_integers(const char* op, const char* name, const Tensor& tensor, int64_t count, const Tensor& boxes) {
  check_device(tensor, op, name);
  FASTSEG_CHECK(tensor.get_device_index() == boxes.get_device_index() && tensor.is_contiguous() &&
                    tensor.scalar_type() == ScalarType::Long && tensor.numel() == count,
                "fastseg::", op, ": ", name, " must be int64, contiguous, on the device of boxes, with ", count,
                " elements");
}

// Also of a tensor of the boxes' dtype.
inline void check_reals(const char* op, const char* name, const Tensor& tensor, int64_t count, const Tensor& boxes) {
  check_device(tensor, op, name);
  FASTSEG_CHECK(tensor.get_device_index() == boxes.get_device_index() && tensor.is_contiguous() &&
                    tensor.scalar_type() == boxes.scalar_type() && tensor.numel() == count,
                "fastseg::", op, ": ", name, " must be of the dtype of boxes, contiguous, on their device, with ",
                count, " elements");
}

// Checks the inputs and returns the number of boxes.
inline int64_t check_boxes(const char* op, const Tensor& boxes, const Tensor& scores,
                           const std::optional<Tensor>& idxs) {
  const int64_t count = scores.numel();
  FASTSEG_CHECK(boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double, "fastseg::", op,
                ": boxes must be float32 or float64");
  FASTSEG_CHECK(scores.dim() == 1 && count < INT32_MAX, "fastseg::", op, ": scores must be (N,), N < 2^31 - 1");
  check_reals(op, "boxes", boxes, 4 * count, boxes);
  check_reals(op, "scores", scores, count, boxes);
  if (idxs) check_integers(op, "idxs", *idxs, count, boxes);
  return count;
}

// Calls body(a value of the boxes' type).
template <typename Body>
cudaError_t with_real_type(const Tensor& boxes, const Body& body) {
  return boxes.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

}  // namespace fastseg::cuda

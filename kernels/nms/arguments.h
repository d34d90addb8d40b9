// Checks of the arguments of nms and soft_nms on the CPU, for memory safety, besides those of dense_values().
#pragma once

#include <optional>

#include "fastseg/arguments.h"

namespace fastseg::nms {

inline void check_integers(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  FASTSEG_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long && tensor.numel() == count,
      "fastseg::_", op, ": ", name, " must be a contiguous int64 CPU tensor with ", count, " elements");
}

inline void check_arguments(const char* op, const Tensor& scores, const std::optional<Tensor>& idxs, int64_t most,
                            const Tensor& indices, const Tensor& count) {
  const int64_t boxes = scores.numel();
  FASTSEG_CHECK(boxes < INT32_MAX, "fastseg::_", op, ": more than 2^31 - 2 boxes");
  if (idxs) check_integers(op, "idxs", *idxs, boxes);
  FASTSEG_CHECK(most >= 0, "fastseg::_", op, ": most must not be negative");
  check_integers(op, "indices", indices, most);
  check_integers(op, "count", count, 1);
}

}  // namespace fastseg::nms

// Checks of the arguments that nms and soft_nms share on the CPU, for memory safety.
#pragma once

#include <optional>

#include "fastseg/dense.h"

namespace fastseg::nms {

inline void check_arguments(const char* op, const Tensor& scores, const std::optional<Tensor>& idxs, int64_t most,
                            const Tensor& indices, const Tensor& count) {
  const int64_t boxes = scores.numel();
  FASTSEG_CHECK(boxes < INT32_MAX, "fastseg::_", op, ": more than 2^31 - 2 boxes");
  dense_values<int64_t>(idxs, boxes, "idxs");
  FASTSEG_CHECK(most >= 0, "fastseg::_", op, ": most must not be negative");
  dense_values<int64_t>(indices, most, "indices");
  dense_values<int64_t>(count, 1, "count");
}

}  // namespace fastseg::nms

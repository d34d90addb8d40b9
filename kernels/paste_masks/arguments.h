// Turns the arguments of the ops into those of the kernels, on the CPU and on CUDA. Checks only what memory safety
// needs: Python has checked the rest.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/check.h"
#include "paste_masks/sampling.h"

namespace fastseg::paste_masks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// masks: (N, rows, columns). output: int32 (N, height, words), bool or float32 (N, height, width), by its form.
inline Problem make_problem(const char* op, const Tensor& masks, int64_t height, int64_t width, double threshold,
                            bool inclusive, int64_t form, const Tensor& output) {
  constexpr int64_t most = (int64_t{1} << 31) - 64;
  FASTSEG_CHECK(masks.dim() == 3 && masks.is_contiguous(), "fastseg::", op, ": masks must be (N, h, w), contiguous");
  FASTSEG_CHECK(form >= 0 && form < 3, "fastseg::", op, ": form must be 0, 1 or 2");
  const Problem problem{masks.size(0),
                        masks.size(1),
                        masks.size(2),
                        height,
                        width,
                        static_cast<Form>(form),
                        limit_of(threshold, inclusive)};
  FASTSEG_CHECK(problem.rows >= 1 && problem.rows < most && problem.columns >= 1 && problem.columns < most,
                "fastseg::", op, ": masks must be of a size that is not 0");
  FASTSEG_CHECK(height >= 1 && height < most && width >= 1 && width < most, "fastseg::", op,
                ": the image must have a size that is not 0");
  const ScalarType types[] = {ScalarType::Int, ScalarType::Bool, ScalarType::Float};
  FASTSEG_CHECK(output.device() == masks.device() && output.is_contiguous() && output.scalar_type() == types[form] &&
                    output.numel() == problem.images * height * problem.row_size(),
                "fastseg::", op, ": output does not fit its form");
  return problem;
}

// Calls fn(scalar_t{}) with the type of the masks.
template <typename Half, typename BFloat16, typename Function>
auto with_mask_type(const char* op, const Tensor& masks, const Function& fn) {
  switch (masks.scalar_type()) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::Half: return fn(Half{});
    default:
      FASTSEG_CHECK(masks.scalar_type() == ScalarType::BFloat16, "fastseg::", op,
                    ": masks must be float32, float16 or bfloat16");
      return fn(BFloat16{});
  }
}

inline ResizeAxis make_axis(const char* op, int64_t source, int64_t padded, int64_t input, int64_t output) {
  constexpr int64_t most = (int64_t{1} << 31) - 64;
  FASTSEG_CHECK(padded >= 1 && padded < most && input >= 1 && input <= padded, "fastseg::", op,
                ": sizes must be positive, that of the input not above the padded one");
  return {static_cast<int>(source), static_cast<int>(padded), static_cast<int>(input), static_cast<int>(output)};
}

}  // namespace fastseg::paste_masks

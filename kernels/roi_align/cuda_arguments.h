// Turns the tensors of the RoI ops into the launchers' views. Checks only what memory safety needs: Python has checked
// the rest. Shared by the registrations of roi_align and roi_pool.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/host.h"
#include "fastseg/layout.h"
#include "roi_align/cuda.h"

namespace fastseg::cuda {

// Calls body(a value of the storage type).
template <typename Body>
cudaError_t with_gpu_type(const char* op, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(c10::Half{});
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    default: fail("fastseg::", op, ": dtype must be float32, float16 or bfloat16");
  }
}

// What a tensor must be: [images, channels, H, W], on the device of `lead`, of dtype `type`.
struct Expected {
  const char* op;
  const Tensor& lead;
  int64_t images, channels;
  ScalarType type;
};

template <typename element_t>
MapView<element_t> view_of(const Expected& expected, const Tensor& tensor, const char* name) {
  constexpr int64_t most = int64_t{1} << 30;
  check_device(tensor, expected.op, name);
  FASTSEG_CHECK(tensor.get_device_index() == expected.lead.get_device_index(), "fastseg::", expected.op, ": ", name,
                " is on another device");
  FASTSEG_CHECK(tensor.dim() == 4 && tensor.size(0) == expected.images && tensor.size(1) == expected.channels,
                "fastseg::", expected.op, ": ", name, " must be (", expected.images, ", ", expected.channels,
                ", H, W)");
  FASTSEG_CHECK(tensor.scalar_type() == expected.type, "fastseg::", expected.op, ": ", name, " has another dtype");
  FASTSEG_CHECK(tensor.size(2) <= most && tensor.size(3) <= most && tensor.size(1) <= most, "fastseg::", expected.op,
                ": ", name, " has sizes beyond 2^30");
  const bool contiguous = tensor.is_contiguous();
  FASTSEG_CHECK(contiguous || is_channels_last(tensor), "fastseg::", expected.op, ": ", name,
                " must be contiguous or channels_last");
  return {static_cast<element_t*>(tensor.data_ptr()), static_cast<int>(tensor.size(2)),
          static_cast<int>(tensor.size(3)), !contiguous};
}

inline const float* boxes_of(const char* op, const Tensor& boxes, const Tensor& lead, int64_t count) {
  check_device(boxes, op, "boxes");
  FASTSEG_CHECK(boxes.get_device_index() == lead.get_device_index() && boxes.is_contiguous() &&
                    boxes.scalar_type() == ScalarType::Float && boxes.dim() == 2 && boxes.size(0) == count &&
                    boxes.size(1) == 5,
                "fastseg::", op, ": boxes must be contiguous float32 (", count, ", 5) on the device of the maps");
  return boxes.const_data_ptr<float>();
}

}  // namespace fastseg::cuda

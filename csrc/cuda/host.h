// What every kernels/<op>/cuda_register.cpp needs to call its torch-free launchers on tensors.
//
// Compiled by the C++ compiler against torch's stable ABI. With -DFASTSEG_EMULATOR the same host code takes
// CPU tensors and registers under torch.ops.fastseg_emulator, where the tests find it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/cuda_compat.h"
#include "fastseg/check.h"

#if defined(FASTSEG_EMULATOR)
#define FASTSEG_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastseg_emulator, CPU, m)
#else
#define FASTSEG_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastseg, CUDA, m)

// Defined by libtorch_cuda.so only. Weak, so that the library can be built and loaded without it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastseg::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(FASTSEG_EMULATOR)

constexpr auto device_type = torch::headeronly::DeviceType::CPU;

// Makes the tensor's device current for the guard's lifetime and gives torch's current stream on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

#else

constexpr auto device_type = torch::headeronly::DeviceType::CUDA;

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor)
      : device_(static_cast<int32_t>(tensor.get_device_index())), guard_(device_) {}

  cudaStream_t stream() const {
    FASTSEG_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "fastseg: this torch has no CUDA");
    void* stream = nullptr;
    FASTSEG_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "fastseg: no CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

inline void check_launch(cudaError_t error, const char* op) {
  FASTSEG_CHECK(error == cudaSuccess, "fastseg::", op, ": CUDA error: ", cudaGetErrorString(error));
}

inline void check_device(const Tensor& tensor, const char* op, const char* name) {
  FASTSEG_CHECK(tensor.device().type() == device_type, "fastseg::", op, ": ", name, " is not on a CUDA device");
}

// Checks that `tensor` is contiguous, on the device of `lead`, of dtype `type`, with `count` elements.
inline void check_list(const char* op, const Tensor& lead, const Tensor& tensor, const char* name, ScalarType type,
                       int64_t count) {
  check_device(tensor, op, name);
  FASTSEG_CHECK(tensor.get_device_index() == lead.get_device_index() && tensor.is_contiguous() &&
                    tensor.scalar_type() == type && tensor.numel() == count,
                "fastseg::", op, ": ", name, " must be contiguous, on the device of the first argument, with ", count,
                " elements of its dtype");
}

}  // namespace fastseg::cuda

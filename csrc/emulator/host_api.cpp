// The few functions of the CUDA runtime API that launchers call, and the limits that a launch is checked
// against.
#include "emulator/cuda_emulator.h"

namespace fastseg::emulator {
namespace {

cudaError_t last_error = cudaSuccess;

// Kernels allowed to use more than 48 KiB of dynamic shared memory, by cudaFuncSetAttribute.
constexpr std::size_t default_shared_bytes = 48 * 1024;
struct DynamicSharedLimit {
  const void* kernel;
  std::size_t bytes;
};
DynamicSharedLimit dynamic_shared_limits[256];
int dynamic_shared_limit_count = 0;

DynamicSharedLimit* find_dynamic_shared_limit(const void* kernel) {
  for (int i = 0; i < dynamic_shared_limit_count; ++i) {
    if (dynamic_shared_limits[i].kernel == kernel) return &dynamic_shared_limits[i];
  }
  return nullptr;
}

cudaError_t check_launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, const void* kernel) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const bool block_fits = threads >= 1 && threads <= max_threads && block.z <= 64;
  const bool grid_fits =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  if (!block_fits || !grid_fits) return cudaErrorInvalidConfiguration;
  const DynamicSharedLimit* limit = find_dynamic_shared_limit(kernel);
  const std::size_t allowed = limit ? limit->bytes : default_shared_bytes;
  return dynamic_shared_bytes > allowed ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

bool accept_launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, const void* kernel,
                   std::size_t& shared_limit) {
  last_error = check_launch(grid, block, dynamic_shared_bytes, kernel);
  shared_limit = find_dynamic_shared_limit(kernel) ? max_shared_bytes : default_shared_bytes;
  return last_error == cudaSuccess;
}

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > max_shared_bytes) return cudaErrorInvalidValue;
  if (DynamicSharedLimit* limit = find_dynamic_shared_limit(kernel)) {
    limit->bytes = static_cast<std::size_t>(bytes);
    return cudaSuccess;
  }
  constexpr int capacity = sizeof dynamic_shared_limits / sizeof *dynamic_shared_limits;
  if (dynamic_shared_limit_count == capacity) return cudaErrorInvalidValue;
  dynamic_shared_limits[dynamic_shared_limit_count++] = {kernel, static_cast<std::size_t>(bytes)};
  return cudaSuccess;
}

}  // namespace fastseg::emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = fastseg::emulator::last_error;
  fastseg::emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unknown error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Few multiprocessors, so that grid-stride loops sized by them go round more than once even on small inputs.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(fastseg::emulator::max_shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

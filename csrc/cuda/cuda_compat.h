// One kernel source for CUDA and for the emulator.
//
// Every kernels/<op>/cuda.cu includes this header first and nothing from CUDA itself. With nvcc it is real
// CUDA. With g++ and -DFASTSEG_EMULATOR (tests only) the same text becomes ordinary C++ that csrc/emulator
// runs on the CPU, one fiber per CUDA thread, so that AddressSanitizer and ThreadSanitizer can check the
// kernel without a GPU.
//
// Three things have no syntax that both compilers accept and are therefore macros:
//   FASTSEG_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)
//       kernel<<<grid, block, dynamic_shared_bytes, stream>>>(arguments...)
//   FASTSEG_SHARED(float, tile, [16][17]);
//       __shared__ float tile[16][17];
//   FASTSEG_DYNAMIC_SHARED(float, buffer);
//       extern __shared__ ..., seen as `float* buffer`
// A kernel with a comma in its template arguments goes in parentheses: FASTSEG_LAUNCH((kernel<T, 128>), ...).
#pragma once

#include <cstdint>

#if defined(FASTSEG_EMULATOR)

#include "emulator/cuda_emulator.h"

#else

#include <cuda_runtime_api.h>

#define FASTSEG_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (dynamic_shared_bytes), (stream)>>>(__VA_ARGS__)

#define FASTSEG_SHARED(type, name, dimensions) __shared__ type name dimensions

#define FASTSEG_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char fastseg_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(fastseg_dynamic_shared)

#endif

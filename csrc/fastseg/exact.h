// For arithmetic that gives the same bits on the CPU and on the GPU.
//
// Sums, differences and quotients already do. Products go through multiply(), so that nvcc does not fuse them with a
// sum; CMakeLists.txt forbids fusing in the CPU sources that call it.
#pragma once

#if defined(__CUDACC__)
#define FASTSEG_HOST_DEVICE __host__ __device__
#else
#define FASTSEG_HOST_DEVICE
#endif

namespace fastseg {

FASTSEG_HOST_DEVICE inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTSEG_HOST_DEVICE inline double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace fastseg

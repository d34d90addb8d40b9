// 16-lane SIMD for the CPU kernels: one source for every instruction level. A vector of 16 floats is one
// register under AVX-512, two under AVX2, four under SSE2 and NEON.
//   simd_vector.h  the types (f32x16, i32x16, ...), operators, select, convert
//   simd_memory.h  load, store, stream, gather, and reductions to one number
//   simd_math.h    exp, log
// Kernels write select(mask, a, b), convert<to>(a) and load(array), never `?:`, __builtin_convertvector or
// lanes[i] = x on a vector: those work at one level only.
#pragma once

#include "fastseg/simd_math.h"
#include "fastseg/simd_memory.h"
#include "fastseg/simd_vector.h"

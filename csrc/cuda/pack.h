// Neighbouring elements that one thread loads or stores at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

// `size` neighbouring elements, moved by 16-byte accesses where that many fit.
template <typename T, int size>
struct alignas(sizeof(T) * size < 16 ? sizeof(T) * size : 16) Pack {
  T values[size];
};

template <int size, typename T>
__device__ Pack<T, size> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, size>*>(from);
}

template <int size, typename T>
__device__ void store_pack(T* to, const Pack<T, size>& pack) {
  *reinterpret_cast<Pack<T, size>*>(to) = pack;
}

inline bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// Whether packs may begin at every multiple of `size` elements.
template <int size, typename T>
bool holds_packs(const T* pointer) {
  return is_aligned(pointer, alignof(Pack<T, size>));
}

}  // namespace fastseg::cuda

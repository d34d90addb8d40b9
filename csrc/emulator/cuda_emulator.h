// CUDA's language extensions as C++ for the CPU: csrc/cuda/cuda_compat.h includes it when g++ compiles a .cu file.
//
// Modelled: block and warp barriers, warp collectives with any mask, static and dynamic shared memory (filled
// with 0xFF bytes, i.e. NaN, at the start of each block), atomics, launch limits. Wrong use aborts with a
// message. Not modelled: blocks running at the same time (they run one after another), memory ordering
// between blocks, inline PTX, tensor cores, cp.async, TMA, speed. For __half and __nv_bfloat16 use c10::Half
// and c10::BFloat16 from torch/headeronly/util, which nvcc compiles too.
//
// FASTSEG_EMULATOR_ORDER = forward (default) | reverse | <seed>: the order in which a block's threads run.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// ---- types and built-in variables ----

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define FASTSEG_VECTOR_TYPES(scalar, name)                             \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };         \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };   \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
FASTSEG_VECTOR_TYPES(float, float)
FASTSEG_VECTOR_TYPES(int, int)
FASTSEG_VECTOR_TYPES(unsigned, uint)
FASTSEG_VECTOR_TYPES(unsigned char, uchar)
#undef FASTSEG_VECTOR_TYPES

// Set by the scheduler before it resumes a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- the runtime (cuda_emulator.cpp, launch checks in host_api.cpp) ----

namespace fastseg::emulator {

// Limits of sm_90. sm_80 differs in shared memory (163 KiB), which launchers ask the device for.
constexpr int max_threads = 1024;
constexpr std::size_t max_shared_bytes = 227 * 1024;

enum class WarpOperation : unsigned char {
  // clang-format off
  syncwarp, shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot, match_any, reduce_add
  // clang-format on
};

// False, with the error recorded for cudaGetLastError, where a GPU would refuse the launch. `shared_limit`
// becomes the shared memory, static and dynamic together, that a block of this launch may have.
bool accept_launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, const void* kernel,
                   std::size_t& shared_limit);

// Runs every block of the grid to its end.
void run_grid(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, const void* kernel, void (*thread_body)(void*),
              void* context);

// __syncthreads; `line` tells barriers apart. Returns how many threads came with predicate != 0.
int block_barrier(int predicate, int line);

// All lanes of `mask` meet; returns this lane's result (of a shuffle: the value of source_lane).
std::uint64_t warp_collective(WarpOperation operation, unsigned mask, std::uint64_t value, int source_lane);

// The block's copy of one __shared__ variable, identified by its slot, allocated by the first thread that reaches it.
struct SharedSlot {
  std::uint64_t block = 0;
  unsigned char* memory = nullptr;
};
void* shared_variable(SharedSlot& slot, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();

int current_lane();

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Arguments are converted to the kernel's parameter types once and copied for every thread, as by CUDA.
template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, void (*kernel)(Parameters...),
            Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {arguments...}};
  const auto thread_body = [](void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.arguments);
  };
  run_grid(grid, block, dynamic_shared_bytes, reinterpret_cast<const void*>(kernel), thread_body, &call);
}

// Relaxed, like CUDA's atomics: ThreadSanitizer sees no order in them.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);  // two bytes: atomicCAS only, on a GPU
  using Word = std::conditional_t<sizeof(T) == 8, std::uint64_t,
                                  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>>;
  auto* word = reinterpret_cast<Word*>(address);
  Word expected = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    const T before = from_bits<T>(expected);
    const Word desired = static_cast<Word>(to_bits<T>(update(before)));
    if (__atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return before;
    }
  }
}

// Keeps T out of deduction, so that atomicAdd(float*, 1) means what it means in CUDA.
template <class T>
struct identity {
  using type = T;
};
template <class T>
using identity_t = typename identity<T>::type;

template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, int source_lane) {
  return from_bits<T>(warp_collective(operation, mask, to_bits(value), source_lane));
}

}  // namespace fastseg::emulator

#define FASTSEG_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  (static_cast<void>(stream), ::fastseg::emulator::launch((grid), (block), (dynamic_shared_bytes), kernel, __VA_ARGS__))

#define FASTSEG_SHARED(type, name, dimensions)        \
  using name##_type = type dimensions;                \
  static ::fastseg::emulator::SharedSlot name##_slot; \
  name##_type& name = *static_cast<name##_type*>(     \
      ::fastseg::emulator::shared_variable(name##_slot, sizeof(name##_type), alignof(name##_type)))

#define FASTSEG_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::fastseg::emulator::dynamic_shared())

// ---- host API used by launchers ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);

namespace fastseg::emulator {
cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return fastseg::emulator::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), value);
}

// ---- device functions ----

inline void __syncthreads(int line = __builtin_LINE()) { fastseg::emulator::block_barrier(0, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return fastseg::emulator::block_barrier(predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return fastseg::emulator::block_barrier(predicate, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return fastseg::emulator::block_barrier(!predicate, line) == 0;
}

inline void __syncwarp(unsigned mask = ~0u) {
  fastseg::emulator::warp_collective(fastseg::emulator::WarpOperation::syncwarp, mask, 0, 0);
}

// `width` splits the warp into segments; a source outside the caller's segment means the caller itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int segment = fastseg::emulator::current_lane() & ~(width - 1);
  const int lane = segment | (source & (width - 1));
  return fastseg::emulator::shuffle(fastseg::emulator::WarpOperation::shuffle, mask, value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const int lane = fastseg::emulator::current_lane(), source = lane ^ lane_mask;
  return fastseg::emulator::shuffle(fastseg::emulator::WarpOperation::shuffle_xor, mask, value,
                                    source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = fastseg::emulator::current_lane(), source = lane + static_cast<int>(delta);
  return fastseg::emulator::shuffle(fastseg::emulator::WarpOperation::shuffle_down, mask, value,
                                    source / width != lane / width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = fastseg::emulator::current_lane(), source = lane - static_cast<int>(delta);
  return fastseg::emulator::shuffle(fastseg::emulator::WarpOperation::shuffle_up, mask, value,
                                    source < (lane & ~(width - 1)) ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace fastseg::emulator;
  return static_cast<unsigned>(warp_collective(WarpOperation::ballot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  using namespace fastseg::emulator;
  return static_cast<unsigned>(warp_collective(WarpOperation::match_any, mask, to_bits(value), 0));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  using namespace fastseg::emulator;
  return static_cast<unsigned>(warp_collective(WarpOperation::reduce_add, mask, value, 0));
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* address, fastseg::emulator::identity_t<T> value) {
  return fastseg::emulator::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, fastseg::emulator::identity_t<T> value) {
  return fastseg::emulator::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, fastseg::emulator::identity_t<T> value) {
  return fastseg::emulator::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, fastseg::emulator::identity_t<T> value) {
  return fastseg::emulator::atomic_update(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicExch(T* address, fastseg::emulator::identity_t<T> value) {
  return fastseg::emulator::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, fastseg::emulator::identity_t<T> compare, fastseg::emulator::identity_t<T> value) {
  return fastseg::emulator::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float numerator, float denominator) { return numerator / denominator; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int bits) { return fastseg::emulator::from_bits<float>(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(fastseg::emulator::to_bits(value)); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

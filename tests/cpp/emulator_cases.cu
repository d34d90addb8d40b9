// Kernels with and without planted bugs, by which tests/cpp/test_emulator.py proves what the emulator and the
// sanitizers see. Usage: emulator_cases <case>; prints "ok" or "wrong" after the case has run.
// nvcc must accept this file too, main() aside.
#include "cuda/cuda_compat.h"

namespace {

constexpr int columns = 512;
constexpr int size_of_half_the_default = 6 * 1024;  // ints in 24 KiB

__device__ __forceinline__ int warp_sum(int value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// One block per row; every warp leaves its sum in shared memory, the first warp adds them up.
template <int block_size, bool with_barrier>
__global__ void __launch_bounds__(block_size) row_sum(const int* input /*[rows, columns]*/, int* output /*[rows]*/) {
  FASTSEG_SHARED(int, warp_sums, [block_size / 32]);
  const int thread = threadIdx.x;
  int sum = 0;
  for (int column = thread; column < columns; column += block_size) sum += input[blockIdx.x * columns + column];
  sum = warp_sum(sum);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  if (with_barrier) __syncthreads();
  if (thread < 32) {
    sum = warp_sum(thread < block_size / 32 ? warp_sums[thread] : 0);
    if (thread == 0) output[blockIdx.x] = sum;
  }
}

// Reverses tiles through shared memory; without the second barrier the next tile overwrites one still being
// read.
template <bool second_barrier>
__global__ void reverse_tiles(const int* input, int* output, int tiles) {
  FASTSEG_DYNAMIC_SHARED(int, tile);
  const int size = blockDim.x, thread = threadIdx.x;
  for (int first = 0; first < tiles * size; first += size) {
    tile[thread] = input[first + thread];
    __syncthreads();
    output[first + thread] = tile[size - 1 - thread];
    if (second_barrier) __syncthreads();
  }
}

template <bool with_syncwarp>
__global__ void exchange_in_warp(int* output) {
  FASTSEG_SHARED(int, values, [32]);
  values[threadIdx.x] = threadIdx.x;
  if (with_syncwarp) __syncwarp();
  output[threadIdx.x] = values[31 - threadIdx.x];
}

// Half warps in different collectives at the same time, then votes over the whole warp and block.
__global__ void partial_masks(int* output /*[4]*/) {
  const int lane = threadIdx.x % 32;
  int value;
  if (lane < 16) {
    value = lane;
    for (int offset = 1; offset < 16; offset *= 2) value += __shfl_xor_sync(0x0000ffffu, value, offset, 16);
    __syncwarp(0x0000ffffu);
  } else {
    value = __shfl_down_sync(0xffff0000u, lane, 1, 16);
  }
  const unsigned odd = __ballot_sync(~0u, value & 1);
  const unsigned same = __match_any_sync(~0u, lane % 4);
  const int multiples = __syncthreads_count(threadIdx.x % 3 == 0);
  if (threadIdx.x == 0) {
    output[0] = value;
    output[1] = static_cast<int>(odd);
    output[2] = static_cast<int>(same);
    output[3] = multiples;
  }
}

__global__ void histogram(int* counts /*[4]*/) {
  FASTSEG_SHARED(int, shared_counts, [4]);
  if (threadIdx.x < 4) shared_counts[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&shared_counts[threadIdx.x % 4], 1);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&counts[threadIdx.x], shared_counts[threadIdx.x]);
}

__global__ void read_unset_shared(float* output) {
  FASTSEG_SHARED(float, never_written, [2][3]);
  output[threadIdx.x] = never_written[1][threadIdx.x];
}

template <int size>  // a template, because GCC puts no red zone behind the static variables of one
__global__ void static_shared_overrun(int* output) {
  FASTSEG_SHARED(int, first, [size]);
  FASTSEG_SHARED(int, second, [size]);
  second[threadIdx.x] = 0;
  int* element = &first[threadIdx.x];  // a pointer, or UBSan would report the index before ASan the access
  element[1] = 1;
  output[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x];
}

__global__ void too_much_shared(int* output) {
  FASTSEG_DYNAMIC_SHARED(int, buffer);
  FASTSEG_SHARED(int, more, [size_of_half_the_default]);
  more[threadIdx.x] = buffer[threadIdx.x] = output[threadIdx.x];
}

__global__ void dynamic_shared_overrun(int* output, int size) {
  FASTSEG_DYNAMIC_SHARED(int, buffer);
  buffer[threadIdx.x] = 1;
  __syncthreads();
  output[threadIdx.x] = buffer[size - threadIdx.x];
}

__global__ void global_overrun(const int* input, int* output, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= size) output[i] = input[0];
}

__global__ void local_overrun(int* output, int size) {
  int values[4] = {1, 2, 3, 4};
  for (int i = 0; i <= size; ++i) values[i] += i;
  output[threadIdx.x] = values[threadIdx.x % 4];
}

__global__ void misaligned_vector(const int* input, int* output) {
  const int4 values = *reinterpret_cast<const int4*>(input + 1);
  output[threadIdx.x] = values.w;
}

__global__ void barrier_in_one_branch(int* output) {
  if (threadIdx.x < 16) __syncthreads();
  output[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void different_barriers(int* output) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    output[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void mask_names_returned_lane(int* output) {
  if (threadIdx.x >= 20) return;
  output[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void mask_omits_caller(int* output) { output[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void different_operations(int* output) {
  output[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : __shfl_down_sync(~0u, 1, 1);
}

}  // namespace

#ifdef FASTSEG_EMULATOR

#include <cstdio>
#include <memory>

namespace {

constexpr int rows = 20;
constexpr int size = 64;

template <bool with_barrier>
bool run_row_sum() {
  std::unique_ptr<int[]> input(new int[rows * columns]), output(new int[rows]());
  for (int i = 0; i < rows * columns; ++i) input[i] = i * 7919 % 17;
  FASTSEG_LAUNCH((row_sum<128, with_barrier>), dim3(rows), dim3(128), 0, nullptr, input.get(), output.get());
  for (int row = 0; row < rows; ++row) {
    int expected = 0;
    for (int column = 0; column < columns; ++column) expected += input[row * columns + column];
    if (output[row] != expected) return false;
  }
  return true;
}

template <bool second_barrier>
bool run_reverse_tiles() {
  constexpr int tiles = 5;
  std::unique_ptr<int[]> input(new int[tiles * size]), output(new int[tiles * size]);
  for (int i = 0; i < tiles * size; ++i) input[i] = i;
  FASTSEG_LAUNCH(reverse_tiles<second_barrier>, dim3(1), dim3(size), size * sizeof(int), nullptr, input.get(),
                 output.get(), tiles);
  for (int i = 0; i < tiles * size; ++i) {
    if (output[i] != i / size * size + size - 1 - i % size) return false;
  }
  return true;
}

template <bool with_syncwarp>
bool run_exchange_in_warp() {
  int output[32];
  FASTSEG_LAUNCH(exchange_in_warp<with_syncwarp>, dim3(1), dim3(32), 0, nullptr, output);
  for (int i = 0; i < 32; ++i) {
    if (output[i] != 31 - i) return false;
  }
  return true;
}

bool run_partial_masks() {
  int output[4];
  FASTSEG_LAUNCH(partial_masks, dim3(1), dim3(1024), 0, nullptr, output);
  // lanes 0-15 hold 120 (even); 16..30 hold the next lane, so 16, 18, ..., 30 odd; 31 keeps its own odd value
  return output[0] == 120 && static_cast<unsigned>(output[1]) == 0xd5550000u &&
         static_cast<unsigned>(output[2]) == 0x11111111u && output[3] == 342;
}

bool run_histogram() {
  int counts[4] = {};
  FASTSEG_LAUNCH(histogram, dim3(3), dim3(100), 0, nullptr, counts);
  return counts[0] == 75 && counts[1] == 75 && counts[2] == 75 && counts[3] == 75;
}

bool run_read_unset_shared() {
  float output[3] = {};
  FASTSEG_LAUNCH(read_unset_shared, dim3(1), dim3(3), 0, nullptr, output);
  return std::isnan(output[0]) && std::isnan(output[1]) && std::isnan(output[2]);
}

// What a GPU refuses, the emulator refuses with the same error code and without running anything.
bool run_launch_limits() {
  int untouched = 7;
  FASTSEG_LAUNCH(histogram, dim3(1), dim3(1025), 0, nullptr, &untouched);
  if (cudaGetLastError() != cudaErrorInvalidConfiguration) return false;
  FASTSEG_LAUNCH(histogram, dim3(0), dim3(32), 0, nullptr, &untouched);
  if (cudaGetLastError() != cudaErrorInvalidConfiguration) return false;
  FASTSEG_LAUNCH(histogram, dim3(1), dim3(32), 49 * 1024, nullptr, &untouched);
  if (cudaGetLastError() != cudaErrorInvalidValue) return false;
  if (cudaFuncSetAttribute(histogram, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024) == cudaSuccess) {
    return false;
  }
  return untouched == 7 && cudaGetLastError() == cudaSuccess;
}

// The cases that need nothing but one buffer: `run(input, output)` over `size` elements each.
template <class Run>
bool with_buffers(Run run) {
  std::unique_ptr<int[]> input(new int[size]()), output(new int[size]());
  run(input.get(), output.get());
  return true;
}

bool run_planted(const char* name) {
  const dim3 one(1), warp(32), full(size);
  const auto is = [&](const char* candidate) { return std::strcmp(name, candidate) == 0; };
  return with_buffers([&](int* input, int* output) {
    if (is("static_shared_overrun")) FASTSEG_LAUNCH(static_shared_overrun<size>, one, full, 0, nullptr, output);
    if (is("too_much_shared")) FASTSEG_LAUNCH(too_much_shared, one, full, 24 * 1024 + 4, nullptr, output);
    if (is("dynamic_shared_overrun")) {
      FASTSEG_LAUNCH(dynamic_shared_overrun, one, full, size * sizeof(int), nullptr, output, size);
    }
    if (is("global_overrun")) FASTSEG_LAUNCH(global_overrun, dim3(2), full, 0, nullptr, input, output, size);
    if (is("local_overrun")) FASTSEG_LAUNCH(local_overrun, one, full, 0, nullptr, output, 4);
    if (is("misaligned_vector")) FASTSEG_LAUNCH(misaligned_vector, one, warp, 0, nullptr, input, output);
    if (is("barrier_in_one_branch")) FASTSEG_LAUNCH(barrier_in_one_branch, one, warp, 0, nullptr, output);
    if (is("different_barriers")) FASTSEG_LAUNCH(different_barriers, one, warp, 0, nullptr, output);
    if (is("mask_names_returned_lane")) FASTSEG_LAUNCH(mask_names_returned_lane, one, warp, 0, nullptr, output);
    if (is("mask_omits_caller")) FASTSEG_LAUNCH(mask_omits_caller, one, warp, 0, nullptr, output);
    if (is("different_operations")) FASTSEG_LAUNCH(different_operations, one, warp, 0, nullptr, output);
  });
}

const struct {
  const char* name;
  bool (*run)();
} checked_cases[] = {
    {"row_sum", run_row_sum<true>},
    {"missing_barrier", run_row_sum<false>},
    {"reverse_tiles", run_reverse_tiles<true>},
    {"write_after_read", run_reverse_tiles<false>},
    {"exchange_in_warp", run_exchange_in_warp<true>},
    {"missing_syncwarp", run_exchange_in_warp<false>},
    {"partial_masks", run_partial_masks},
    {"histogram", run_histogram},
    {"unset_shared_is_nan", run_read_unset_shared},
    {"launch_limits", run_launch_limits},
};

}  // namespace

int main(int argument_count, char** arguments) {
  const char* name = argument_count > 1 ? arguments[1] : "";
  bool correct = true, found = false;
  for (const auto& candidate : checked_cases) {
    if (std::strcmp(name, candidate.name) != 0) continue;
    correct = candidate.run();
    found = true;
  }
  if (!found) run_planted(name);
  std::puts(correct ? "ok" : "wrong");
  return correct ? 0 : 1;
}

#endif

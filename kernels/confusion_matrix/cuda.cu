// Confusion matrix on CUDA: each thread merges runs of equal label pairs in registers, each block counts runs in shared
// memory, and blocks add their counts to global memory by 64-bit integer atomics. See README.md.
#include "confusion_matrix/cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/accumulate.h"
#include "cuda/pack.h"

namespace fastseg::cuda {
namespace {

constexpr int tile_pixels = 128;  // channels_last logits: pixels per block and round
constexpr int tile_classes = 32;  // and classes staged in shared memory at a time

struct Labels {
  int classes;
  int64_t ignore_index;

  // The bin of a pixel, or -1 if it does not count.
  __device__ int bin(int64_t truth, int64_t prediction) const {
    if (truth == ignore_index || truth < 0 || truth >= classes || prediction < 0 || prediction >= classes) return -1;
    return static_cast<int>(truth) * classes + static_cast<int>(prediction);
  }
};

// The counters of one block: several copies of [bins] in dynamic shared memory, or without copies global memory.
struct Counters {
  int bins, copies;
  unsigned* shared;            // [copies, bins]
  unsigned long long* global;  // [bins]

  __device__ void clear() const {
    for (int i = threadIdx.x; i < copies * bins; i += blockDim.x) shared[i] = 0;
    __syncthreads();
  }

  __device__ void add(int bin, unsigned count) const {
    if (copies == 0) atomicAdd(&global[bin], static_cast<unsigned long long>(count));
    else atomicAdd(&shared[threadIdx.x / 32 % copies * bins + bin], count);
  }

  // Adds the block's counts to global memory.
  __device__ void finish() const {
    __syncthreads();
    if (copies == 0) return;
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      unsigned long long sum = 0;
      for (int copy = 0; copy < copies; ++copy) sum += shared[copy * bins + bin];
      if (sum != 0) atomicAdd(&global[bin], sum);
    }
  }
};

// Successive pixels of a thread mostly share a bin: one atomic per run instead of one per pixel.
class Run {
 public:
  __device__ explicit Run(const Counters& counters) : counters_(counters) {}

  __device__ void add(int bin) {
    if (bin == bin_) {
      ++length_;
      return;
    }
    flush();
    bin_ = bin;
    length_ = 1;
  }

  __device__ void flush() {
    if (bin_ >= 0) counters_.add(bin_, length_);
  }

 private:
  const Counters& counters_;
  int bin_ = -1;
  unsigned length_ = 0;
};

// The first maximum so far; NaN is above every number, and the first NaN stays.
template <typename value_t>
struct Maximum {
  value_t value;
  int label;

  __device__ void offer(value_t candidate, int candidate_label) {
    if (!(candidate <= value) && value == value) {
      value = candidate;
      label = candidate_label;
    }
  }
};

template <typename prediction_t, typename target_t, int width>
__global__ void __launch_bounds__(1024)
    count_labels(const prediction_t* __restrict__ prediction,  // [pixels]
                 const target_t* __restrict__ target,          // [pixels]
                 int64_t pixels, Labels labels, int copies, unsigned long long* __restrict__ counts) {
  FASTSEG_DYNAMIC_SHARED(unsigned, shared_counts);
  const Counters counters{labels.classes * labels.classes, copies, shared_counts, counts};
  counters.clear();
  Run run(counters);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t packs = pixels / width;
  for (int64_t pack = thread; pack < packs; pack += threads) {
    const auto predicted = load_pack<width>(prediction + pack * width);
    const auto truth = load_pack<width>(target + pack * width);
#pragma unroll
    for (int i = 0; i < width; ++i) run.add(labels.bin(truth.values[i], predicted.values[i]));
  }
  for (int64_t pixel = packs * width + thread; pixel < pixels; pixel += threads) {
    run.add(labels.bin(target[pixel], prediction[pixel]));
  }
  run.flush();
  counters.finish();
}

// A thread takes `width` neighbouring pixels of a plane and loops over the classes; width divides plane.
template <typename scalar_t, typename target_t, int width>
__global__ void __launch_bounds__(256)
    count_planar_logits(const scalar_t* __restrict__ logits,  // [images, classes, plane]
                        const target_t* __restrict__ target,  // [images, plane]
                        int64_t images, int64_t plane, Labels labels, int copies,
                        unsigned long long* __restrict__ counts) {
  FASTSEG_DYNAMIC_SHARED(unsigned, shared_counts);
  const Counters counters{labels.classes * labels.classes, copies, shared_counts, counts};
  counters.clear();
  Run run(counters);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t packs = images * plane / width;
  for (int64_t pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; pack < packs; pack += threads) {
    const int64_t pixel = pack * width, image = pixel / plane;
    const scalar_t* column = logits + image * labels.classes * plane + (pixel - image * plane);
    Maximum<accumulate_t<scalar_t>> best[width];
    for (int c = 0; c < labels.classes; ++c, column += plane) {
      const auto candidates = load_pack<width>(column);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const auto candidate = static_cast<accumulate_t<scalar_t>>(candidates.values[i]);
        if (c == 0) best[i] = {candidate, 0};
        else best[i].offer(candidate, c);
      }
    }
#pragma unroll
    for (int i = 0; i < width; ++i) run.add(labels.bin(target[pixel + i], best[i].label));
  }
  run.flush();
  counters.finish();
}

// A block takes tile_pixels pixels at a time; warps copy the classes of a pixel to shared memory side by
// side, then every thread scans the classes of its own pixel.
template <typename scalar_t, typename target_t>
__global__ void __launch_bounds__(tile_pixels)
    count_interleaved_logits(const scalar_t* __restrict__ logits,  // [pixels, classes]
                             const target_t* __restrict__ target,  // [pixels]
                             int64_t pixels, Labels labels, int copies, unsigned long long* __restrict__ counts) {
  using value_t = accumulate_t<scalar_t>;
  FASTSEG_DYNAMIC_SHARED(unsigned, shared_counts);
  FASTSEG_SHARED(value_t, tile, [tile_pixels][tile_classes + 1]);  // the odd stride spreads a column over the banks
  const Counters counters{labels.classes * labels.classes, copies, shared_counts, counts};
  counters.clear();
  Run run(counters);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * tile_pixels;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile_pixels; first < pixels; first += stride) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(tile_pixels), pixels - first));
    const bool has_pixel = static_cast<int>(threadIdx.x) < rows;
    Maximum<value_t> best{};
    for (int begin = 0; begin < labels.classes; begin += tile_classes) {
      const int width = min(tile_classes, labels.classes - begin);
      __syncthreads();  // the previous round has been read
      for (int row = warp; row < rows; row += tile_pixels / 32) {
        if (lane < width) {
          tile[row][lane] = static_cast<value_t>(logits[(first + row) * labels.classes + begin + lane]);
        }
      }
      __syncthreads();
      if (!has_pixel) continue;
      for (int c = 0; c < width; ++c) {
        const value_t candidate = tile[threadIdx.x][c];
        if (begin + c == 0) best = {candidate, 0};
        else best.offer(candidate, begin + c);
      }
    }
    if (has_pixel) run.add(labels.bin(target[first + threadIdx.x], best.label));
  }
  run.flush();
  counters.finish();
}

// ---- launches ----

struct Configuration {
  int blocks, threads, copies;
  size_t shared_bytes;
};

// Enough blocks to fill the device, but no more than `work` items need, at one per thread and round. Counters are kept
// in shared memory, in as many copies for warps as 16 KiB allow, unless a single copy exceeds `shared_limit`.
cudaError_t configure(Configuration& configuration, int64_t work, int threads, int classes, int64_t shared_limit) {
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  const int64_t bytes = static_cast<int64_t>(classes) * classes * static_cast<int64_t>(sizeof(unsigned));
  int copies = bytes <= shared_limit ? 1 : 0;
  while (copies > 0 && 2 * copies <= threads / 32 && 2 * copies * bytes <= 16 * 1024) copies *= 2;
  constexpr int64_t most_per_block = int64_t{1} << 27;  // items of up to 16 pixels: no 32-bit counter can overflow
  int64_t blocks = (work + threads - 1) / threads;
  const int64_t resident = static_cast<int64_t>(processors) * (2048 / threads);
  if (blocks > resident) blocks = resident;
  if (blocks < work / most_per_block + 1) blocks = work / most_per_block + 1;
  configuration = {static_cast<int>(blocks), threads, copies, static_cast<size_t>(copies * bytes)};
  return cudaSuccess;
}

// Reading logits dominates, so more blocks are preferred to more bins. The tile and the counters must stay below 48
// KiB.
template <typename scalar_t>
constexpr int64_t logits_shared_limit = sizeof(scalar_t) == 8 ? 12 * 1024 : 24 * 1024;

template <typename prediction_t, typename target_t, int width>
cudaError_t launch_labels(const prediction_t* prediction, const target_t* target, int64_t pixels, const Labels& labels,
                          unsigned long long* counts, cudaStream_t stream) {
  int device = 0, most_shared = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  // large counters leave room for few blocks, which then must be large
  const int threads = static_cast<int64_t>(labels.classes) * labels.classes > 6 * 1024 ? 1024 : 256;
  Configuration with;
  if (cudaError_t error = configure(with, (pixels + width - 1) / width, threads, labels.classes, most_shared))
    return error;
  const auto kernel = count_labels<prediction_t, target_t, width>;
  const int shared_bytes = static_cast<int>(with.shared_bytes);
  if (shared_bytes > 48 * 1024) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t error = cudaFuncSetAttribute(kernel, attribute, shared_bytes)) return error;
  }
  FASTSEG_LAUNCH(kernel, dim3(with.blocks), dim3(with.threads), with.shared_bytes, stream, prediction, target, pixels,
                 labels, with.copies, counts);
  return cudaGetLastError();
}

template <typename scalar_t, typename target_t, int width>
cudaError_t launch_planar(const scalar_t* logits, const target_t* target, int64_t images, int64_t plane,
                          const Labels& labels, unsigned long long* counts, cudaStream_t stream) {
  Configuration with;
  const int64_t packs = images * plane / width;
  if (cudaError_t error = configure(with, packs, 256, labels.classes, logits_shared_limit<scalar_t>)) return error;
  FASTSEG_LAUNCH((count_planar_logits<scalar_t, target_t, width>), dim3(with.blocks), dim3(with.threads),
                 with.shared_bytes, stream, logits, target, images, plane, labels, with.copies, counts);
  return cudaGetLastError();
}

}  // namespace

template <typename prediction_t, typename target_t>
cudaError_t launch_confusion_matrix_of_labels(const prediction_t* prediction, const target_t* target, int64_t pixels,
                                              int classes, int64_t ignore_index, unsigned long long* counts,
                                              cudaStream_t stream) {
  constexpr int width = 8;
  const Labels labels{classes, ignore_index};
  if (holds_packs<width>(prediction) && holds_packs<width>(target)) {
    return launch_labels<prediction_t, target_t, width>(prediction, target, pixels, labels, counts, stream);
  }
  return launch_labels<prediction_t, target_t, 1>(prediction, target, pixels, labels, counts, stream);
}

template <typename scalar_t, typename target_t>
cudaError_t launch_confusion_matrix_of_logits(const scalar_t* logits, const target_t* target, int64_t images,
                                              int64_t plane, int classes, bool channels_last, int64_t ignore_index,
                                              unsigned long long* counts, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(scalar_t);
  const Labels labels{classes, ignore_index};
  if (channels_last) {
    Configuration with;
    const int64_t pixels = images * plane;
    if (cudaError_t error = configure(with, pixels, tile_pixels, classes, logits_shared_limit<scalar_t>)) return error;
    FASTSEG_LAUNCH((count_interleaved_logits<scalar_t, target_t>), dim3(with.blocks), dim3(with.threads),
                   with.shared_bytes, stream, logits, target, pixels, labels, with.copies, counts);
    return cudaGetLastError();
  }
  if (plane % width == 0 && holds_packs<width>(logits)) {
    return launch_planar<scalar_t, target_t, width>(logits, target, images, plane, labels, counts, stream);
  }
  return launch_planar<scalar_t, target_t, 1>(logits, target, images, plane, labels, counts, stream);
}

#define INSTANTIATE_LABELS(prediction_t, target_t)                                                                    \
  template cudaError_t launch_confusion_matrix_of_labels(const prediction_t*, const target_t*, int64_t, int, int64_t, \
                                                         unsigned long long*, cudaStream_t);
#define INSTANTIATE_LOGITS(scalar_t, target_t)                                                                    \
  template cudaError_t launch_confusion_matrix_of_logits(const scalar_t*, const target_t*, int64_t, int64_t, int, \
                                                         bool, int64_t, unsigned long long*, cudaStream_t);
#define INSTANTIATE(target_t)             \
  INSTANTIATE_LABELS(uint8_t, target_t)   \
  INSTANTIATE_LABELS(int32_t, target_t)   \
  INSTANTIATE_LABELS(int64_t, target_t)   \
  INSTANTIATE_LOGITS(float, target_t)     \
  INSTANTIATE_LOGITS(double, target_t)    \
  INSTANTIATE_LOGITS(c10::Half, target_t) \
  INSTANTIATE_LOGITS(c10::BFloat16, target_t)
INSTANTIATE(uint8_t)
INSTANTIATE(int32_t)
INSTANTIATE(int64_t)

}  // namespace fastseg::cuda

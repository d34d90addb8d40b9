// Binds the launchers of cuda.cu to torch.ops.fastseg._count_runs and _run_lengths on CUDA.
#include "cuda/mask_arguments.h"
#include "run_lengths/cuda.h"

namespace fastseg::cuda {
namespace {

RowMasks row_masks(const char* op, const Tensor& words, const Tensor& boxes, int64_t width) {
  check_words(op, words);
  check_list(op, words, boxes, "boxes", ScalarType::Int, 4 * words.size(0));
  FASTSEG_CHECK(width >= 0 && words_in_row(width) == words.size(2) && words.size(1) * width < int64_t{1} << 31,
                "fastseg::", op, ": width does not fit words, or there are too many pixels");
  return {words_of(words), reinterpret_cast<const Box*>(boxes.const_data_ptr<int32_t>()),
          words.size(0),   words.size(1),
          width,           words.size(2)};
}

void count_runs(const Tensor& words, const Tensor& boxes, int64_t width, const Tensor& runs) {
  constexpr const char* op = "_count_runs";
  const RowMasks masks = row_masks(op, words, boxes, width);
  check_list(op, words, runs, "runs", ScalarType::Long, masks.count);
  if (masks.count == 0) return;
  const OnDeviceOf device(words);
  check_launch(launch_count_runs(masks, long_output(runs), device.stream()), op);
}

void run_lengths(const Tensor& words, const Tensor& boxes, int64_t width, const Tensor& ends, int64_t total,
                 const Tensor& counts) {
  constexpr const char* op = "_run_lengths";
  const RowMasks masks = row_masks(op, words, boxes, width);
  check_list(op, words, ends, "ends", ScalarType::Long, masks.count);
  check_list(op, words, counts, "counts", ScalarType::Long, total);
  if (total == 0 || masks.count == 0) return;
  const OnDeviceOf device(words);
  const Tensor places = torch::stable::new_empty(words, {total}, ScalarType::Long);
  check_launch(
      launch_run_lengths(masks, longs_of(ends), total, long_output(places), long_output(counts), device.stream()), op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_count_runs", TORCH_BOX(&count_runs));
  m.impl("_run_lengths", TORCH_BOX(&run_lengths));
}

}  // namespace fastseg::cuda

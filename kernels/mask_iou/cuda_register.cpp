// Binds the launchers of cuda.cu to torch.ops.fastseg._mask_iou on CUDA.
#include <optional>

#include "cuda/mask_arguments.h"
#include "mask_iou/cuda.h"

namespace fastseg::cuda {
namespace {

enum Denominator : int64_t { kUnion, kSmaller, kNothing };

template <typename value_t>
cudaError_t launch(const KnownMasks& a, const KnownMasks& b, const IouOptions& options, bool pairs, const Tensor& iou,
                   cudaStream_t stream) {
  value_t* to = iou.mutable_data_ptr<value_t>();
  return pairs ? launch_mask_iou_of_pairs(a, b, options, to, stream) : launch_mask_iou(a, b, options, to, stream);
}

void forward(const Tensor& words_a, const Tensor& area_a, const Tensor& boxes_a, const Tensor& words_b,
             const Tensor& area_b, const Tensor& boxes_b, std::optional<Tensor> crowd, int64_t denominator, bool pairs,
             const Tensor& iou) {
  constexpr const char* op = "_mask_iou";
  const KnownMasks a = known_masks(op, words_a, area_a, boxes_a), b = known_masks(op, words_b, area_b, boxes_b);
  FASTSEG_CHECK(words_a.get_device_index() == words_b.get_device_index() && a.height == b.height &&
                    a.pitch == b.pitch && (!pairs || a.count == b.count),
                "fastseg::_mask_iou: the masks of a and b differ in device, size or number");
  if (crowd) check_list(op, words_a, *crowd, "crowd", ScalarType::Bool, b.count);
  const bool counts = denominator == kNothing;
  const ScalarType dtype = counts ? ScalarType::Long : ScalarType::Float;
  check_list(op, words_a, iou, "iou", dtype, pairs ? a.count : a.count * b.count);
  if (iou.numel() == 0) return;
  const OnDeviceOf device(words_a);
  const bool same = a.words == b.words && a.areas == b.areas && a.boxes == b.boxes && a.count == b.count;
  const IouOptions options{crowd ? crowd->const_data_ptr<bool>() : nullptr, denominator == kSmaller, same && !crowd};
  const auto run = counts ? launch<int64_t> : launch<float>;
  check_launch(run(a, b, options, pairs, iou, device.stream()), op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) { m.impl("_mask_iou", TORCH_BOX(&forward)); }

}  // namespace fastseg::cuda

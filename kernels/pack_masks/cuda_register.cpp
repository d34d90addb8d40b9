// Binds the launchers of cuda.cu to torch.ops.fastseg._pack_masks and _unpack_masks on CUDA.
#include <algorithm>
#include <cmath>
#include <optional>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/mask_arguments.h"
#include "masks_to_boxes/cuda.h"
#include "pack_masks/cuda.h"

namespace fastseg::cuda {
namespace {

// Calls body(a value of the pixels' type), uint8_t for bool.
template <typename Body>
cudaError_t with_pixel_type(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte: return body(uint8_t{});
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(c10::Half{});
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    default: fail("fastseg::", op, ": masks must be bool, uint8 or floating");
  }
}

template <typename pixel_t>
double in_type_of(double threshold) {
  if constexpr (std::is_same_v<pixel_t, uint8_t>) return std::clamp(std::floor(threshold), -1.0, 255.0);
  if constexpr (std::is_same_v<pixel_t, double>) return threshold;
  return static_cast<float>(static_cast<pixel_t>(static_cast<float>(threshold)));
}

void pack_forward(const Tensor& masks, std::optional<double> threshold, const Tensor& words, const Tensor& area,
                  const Tensor& boxes) {
  constexpr const char* op = "_pack_masks";
  check_device(masks, op, "masks");
  const KnownMasks packed = known_masks(op, words, area, boxes);
  FASTSEG_CHECK(masks.dim() == 3 && masks.get_device_index() == words.get_device_index() &&
                    masks.size(0) == packed.count && masks.size(1) == packed.height &&
                    words_in_row(masks.size(2)) == packed.pitch,
                "fastseg::_pack_masks: words do not have the size of masks");
  if (packed.count == 0) return;
  const OnDeviceOf device(masks);
  const int64_t width = masks.size(2);
  const Tensor source = width <= 1 || masks.stride(2) == 1 ? masks : torch::stable::contiguous(masks);
  auto* to = reinterpret_cast<unsigned*>(words.mutable_data_ptr<int32_t>());
  if (words.numel() > 0) {
    check_launch(with_pixel_type(op, source.scalar_type(),
                                 [&](auto zero) {
                                   using pixel_t = decltype(zero);
                                   const Pixels<pixel_t> pixels{static_cast<const pixel_t*>(source.const_data_ptr()),
                                                                width, source.stride(0), source.stride(1)};
                                   return launch_pack_masks(pixels, in_type_of<pixel_t>(threshold.value_or(0)), to,
                                                            packed.count, packed.height, device.stream());
                                 }),
                 op);
  }
  auto* found = reinterpret_cast<Box*>(boxes.mutable_data_ptr<int32_t>());
  check_launch(
      launch_mask_statistics(to, packed.count, packed.height, packed.pitch, long_output(area), found, device.stream()),
      op);
}

void unpack_forward(const Tensor& words, int64_t width, ScalarType dtype, const Tensor& masks) {
  constexpr const char* op = "_unpack_masks";
  check_words(op, words);
  const int64_t rows = words.size(0) * words.size(1);
  FASTSEG_CHECK(width >= 0 && words_in_row(width) == words.size(2), "fastseg::_unpack_masks: width does not fit words");
  check_list(op, words, masks, "masks", dtype, rows * width);
  if (masks.numel() == 0) return;
  const OnDeviceOf device(words);
  check_launch(with_pixel_type(op, dtype,
                               [&](auto zero) {
                                 auto* to = static_cast<decltype(zero)*>(masks.mutable_data_ptr());
                                 return launch_unpack_masks(words_of(words), rows, width, to, device.stream());
                               }),
               op);
}

}  // namespace

FASTSEG_CUDA_LIBRARY_IMPL(m) {
  m.impl("_pack_masks", TORCH_BOX(&pack_forward));
  m.impl("_unpack_masks", TORCH_BOX(&unpack_forward));
}

}  // namespace fastseg::cuda

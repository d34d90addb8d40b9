// Turns stable-ABI tensors into the views of pixel_tile.h. Checks only what memory safety needs: Python has checked
// everything else.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "fastseg/dense.h"
#include "fastseg/pixel_tile.h"

namespace fastseg {

// Calls fn(scalar_t{}) for the four storage types.
template <typename Function>
auto with_floating_type(const Tensor& tensor, const char* name, const Function& fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::Double: return fn(double{});
    case ScalarType::Half: return fn(simd::Half{});
    default:
      FASTSEG_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name,
                    " must be float32, float64, float16 or bfloat16");
      return fn(simd::BFloat16{});
  }
}

// Writes a number to a CPU tensor of one element, of any floating type.
inline void write_number(const Tensor& tensor, double value, const char* name) {
  FASTSEG_CHECK(tensor.is_cpu() && tensor.numel() == 1, name, " must be a CPU tensor of one element");
  with_floating_type(tensor, name, [&](auto zero) {
    using scalar_t = decltype(zero);
    *tensor.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(static_cast<simd::accumulate<scalar_t>>(value));
  });
}

// The first element of a tensor of any floating type.
inline double first_number_of(const Tensor& tensor, const char* name) {
  FASTSEG_CHECK(tensor.is_cpu() && tensor.numel() > 0, name, " must be a CPU tensor with elements");
  return with_floating_type(tensor, name, [&](auto zero) -> double {
    using scalar_t = decltype(zero);
    return static_cast<simd::accumulate<scalar_t>>(*tensor.const_data_ptr<scalar_t>());
  });
}

// The same for a tensor of one element.
inline double number_of(const Tensor& tensor, const char* name) {
  FASTSEG_CHECK(tensor.numel() == 1, name, " must have one element");
  return first_number_of(tensor, name);
}

// How tensors of the same sizes [N, C, d1, ..., dk] are walked in tiles: as [N, C, P] with P = d1 ... dk, or, where
// `may_join` and the layouts allow it (channels_last does), as the [1, C, N P] of one image, whose tiles are longer.
// Inputs that have neither a unit class nor a unit pixel stride are copied, and the copies live as long as the walk;
// outputs must have a unit stride.
class PixelWalk {
 public:
  PixelWalk(std::vector<Tensor> inputs, const std::vector<Tensor>& outputs, bool may_join = true)
      : tensors_(std::move(inputs)) {
    const size_t copyable = tensors_.size();
    tensors_.insert(tensors_.end(), outputs.begin(), outputs.end());
    const auto sizes = tensors_[0].sizes();
    FASTSEG_CHECK(sizes.size() >= 2, "a tensor of pixels must be [N, C, ...]");
    images = sizes[0];
    classes = sizes[1];
    for (size_t dim = 2; dim < sizes.size(); ++dim) pixels *= sizes[dim];
    for (const Tensor& tensor : tensors_) {
      const auto own = tensor.sizes();
      FASTSEG_CHECK(tensor.is_cpu() && own.size() == sizes.size() && std::equal(own.begin(), own.end(), sizes.begin()),
                    "tensors of pixels must have the same sizes, on the CPU");
    }
    if (images * classes * pixels == 0) {
      strides_.assign(tensors_.size(), {0, 1, 1});
      return;
    }
    if (may_join && find_strides(/*one_image=*/true)) {
      pixels *= images;
      images = 1;
      return;
    }
    if (find_strides(/*one_image=*/false)) return;
    for (size_t i = 0; i < copyable; ++i) tensors_[i] = torch::stable::contiguous(tensors_[i]);
    FASTSEG_CHECK(find_strides(/*one_image=*/false), "an output of pixels must be dense");
  }

  // The view of the tensor at `index`; inputs are counted first.
  template <typename scalar_t>
  PixelView<const scalar_t> input(size_t index) const {
    const Strides& strides = strides_[index];
    return {tensors_[index].const_data_ptr<scalar_t>(), strides.image, strides.category, strides.pixel};
  }
  template <typename scalar_t>
  PixelView<scalar_t> output(size_t index) const {
    const Strides& strides = strides_[index];
    return {tensors_[index].mutable_data_ptr<scalar_t>(), strides.image, strides.category, strides.pixel};
  }

  int64_t images, classes, pixels = 1;

 private:
  struct Strides {
    int64_t image, category, pixel;
  };

  bool find_strides(bool one_image) {
    strides_.clear();
    for (const Tensor& tensor : tensors_) {
      const auto sizes = tensor.sizes(), steps = tensor.strides();
      Strides strides{one_image ? 0 : steps[0], sizes[1] > 1 ? steps[1] : 1, 1};
      int64_t extent = 1;  // elements of the dimensions visited so far
      for (int64_t dim = static_cast<int64_t>(sizes.size()) - 1; dim >= 0; --dim) {
        if (dim == 1 || (dim == 0 && !one_image) || sizes[dim] == 1) continue;
        if (extent == 1) {
          strides.pixel = steps[dim];
        } else if (steps[dim] != strides.pixel * extent) {
          return false;
        }
        extent *= sizes[dim];
      }
      if (strides.category != 1 && strides.pixel != 1) return false;
      strides_.push_back(strides);
    }
    return true;
  }

  std::vector<Tensor> tensors_;
  std::vector<Strides> strides_;
};

// `target` is contiguous, [N, P].
inline LabelView label_view(const Tensor& target, int64_t count, int64_t classes, int64_t ignore_index) {
  FASTSEG_CHECK(target.is_cpu() && target.is_contiguous() && target.numel() == count,
                "target must be a contiguous CPU tensor with ", count, " labels");
  FASTSEG_CHECK(classes >= 1 && classes <= INT32_MAX, "input must have 1 to 2^31 - 1 classes");
  LabelView::Type type = LabelView::Type::int64;
  if (target.scalar_type() == ScalarType::Int) {
    type = LabelView::Type::int32;
  } else if (target.scalar_type() == ScalarType::Byte) {
    type = LabelView::Type::uint8;
  } else {
    FASTSEG_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64, int32 or uint8");
  }
  return {target.const_data_ptr(), type, ignore_index, classes};
}

}  // namespace fastseg

// Area and tight box of packed masks, in one pass over their words. See README.md.
#include <torch/csrc/stable/library.h>

#include "fastseg/packed_masks.h"

namespace {

using torch::stable::Tensor;

// words: [N, H, words]; area: [N]; boxes: [N, 4]
void statistics(const Tensor& words, const Tensor& area, const Tensor& boxes) {
  constexpr const char* op = "_mask_statistics";
  const fastseg::PackedMasks masks = fastseg::packed_masks(words, op);
  fastseg::check_statistics(masks, area, boxes);
  auto* found = reinterpret_cast<fastseg::Box*>(boxes.mutable_data_ptr<int32_t>());
  fastseg::collect_statistics(masks, area.mutable_data_ptr<int64_t>(), found,
                              [&](int64_t mask, int64_t first, int64_t rows) {
                                fastseg::RowStatistics statistics(masks.pitch);
                                for (int64_t y = first; y < first + rows; ++y)
                                  statistics.add(masks.mask(mask) + y * masks.pitch, y);
                                return statistics.found();
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_mask_statistics", TORCH_BOX(&statistics)); }

// The order in which boxes are visited: by score, or by class. Shared with soft_nms.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "fastseg/parallel.h"

namespace fastseg::nms {

// The positions of `keys` in ascending, stable order: a radix sort that skips the digits that all keys share.
template <typename key_t>
std::vector<int32_t> stable_order(const std::vector<key_t>& keys) {
  constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
  const int64_t count = static_cast<int64_t>(keys.size());
  std::vector<int32_t> order(count), sorted(count);
  std::iota(order.begin(), order.end(), 0);
  for (int shift = 0; count > 0 && shift < std::numeric_limits<key_t>::digits; shift += kDigitBits) {
    const auto digit = [&](key_t key) { return static_cast<int>(key >> shift & (kDigits - 1)); };
    int64_t begin[kDigits + 1] = {};
    for (const key_t key : keys) ++begin[digit(key) + 1];
    if (begin[digit(keys[0]) + 1] == count) continue;
    std::partial_sum(begin, begin + kDigits, begin);
    for (const int32_t position : order) sorted[begin[digit(keys[position])]++] = position;
    std::swap(order, sorted);
  }
  return order;
}

// Boxes in the order in which they are visited: class after class, each class by score.
struct Groups {
  std::vector<int32_t> members;  // ranks, i.e. places in the order of scores
  std::vector<int32_t> begin;    // where each group begins in `members`; then the end

  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }

  // Calls body(group) for every group, on several threads if there is enough work. `body` must not throw.
  template <typename Body>
  void for_each(const Body& body) const {
    constexpr int64_t kFewestPairs = 1 << 22;
    int64_t pairs = 0;
    for (int64_t group = 0; group < count(); ++group) {
      const int64_t size = begin[group + 1] - begin[group];
      pairs += size * size / 2;
    }
    if (pairs < kFewestPairs) {
      for (int64_t group = 0; group < count(); ++group) body(group);
      return;
    }
    share_slices(count(), [&](const auto& take) {
      for (int64_t group = take(); group >= 0; group = take()) body(group);
    });
  }
};

// order: the boxes by score. classes: of every box, or null for a single class.
inline Groups make_groups(const std::vector<int32_t>& order, const int64_t* classes) {
  const int32_t count = static_cast<int32_t>(order.size());
  Groups groups;
  if (classes == nullptr) {
    groups.members.resize(count);
    std::iota(groups.members.begin(), groups.members.end(), 0);
    groups.begin = {0, count};
    return groups;
  }
  std::vector<uint64_t> keys(count);
  for (int32_t rank = 0; rank < count; ++rank) keys[rank] = static_cast<uint64_t>(classes[order[rank]]);
  groups.members = stable_order(keys);
  for (int32_t i = 0; i < count; ++i) {
    if (i == 0 || keys[groups.members[i]] != keys[groups.members[i - 1]]) groups.begin.push_back(i);
  }
  groups.begin.push_back(count);
  return groups;
}

}  // namespace fastseg::nms

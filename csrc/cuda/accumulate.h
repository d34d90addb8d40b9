// The type in which values of a storage type are compared and added up.
#pragma once

#include <type_traits>

namespace fastseg::cuda {

template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fastseg::cuda

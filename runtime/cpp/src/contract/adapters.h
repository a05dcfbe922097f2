// Adapters of a bundle: copies of the weights that LoRAs change, with their changes added. As Python's
// tgate_runtime.adapters, but for the order in which a product sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "contract/bundle.h"

namespace tgate {

/// How large a scale may be; what is usual is 0.5 to 1.5.
inline constexpr double most_adapter_scale = 1e4;

/// A tensor in place of one of the weight file's.
struct HostWeight {
  Dtype dtype{};
  std::vector<std::int64_t> shape;
  std::vector<std::byte> data;
};
using Instead = std::map<std::string, HostWeight, std::less<>>;

/// Adapters by their names, and how much of each.
using Scales = std::map<std::string, double, std::less<>>;

/// The weights that those adapters change, changed, by their names, in their dtype. All numbers are float32 until the end:
/// W + the sum of scale * factor * up @ down, in the order of the adapters' names. Throws Error of Code::request for an
/// adapter that is not there, a scale that is none, and weights that do not change or fit; of Code::bundle for an adapter's
/// file that does not fit the weights.
Instead weights_with(const Bundle& bundle, const Scales& scales);

}  // namespace tgate

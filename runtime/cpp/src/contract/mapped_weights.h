// The weight file of a bundle, mapped.
#pragma once

#include <cstddef>

#include "contract/bundle.h"

namespace tgate {

/// The file's bytes, for as long as this is there.
class MappedWeights {
 public:
  /// Throws Error of Code::bundle where it cannot be opened, of Code::memory where it cannot be mapped.
  explicit MappedWeights(const Bundle& bundle);
  ~MappedWeights();
  MappedWeights(const MappedWeights&) = delete;
  MappedWeights& operator=(const MappedWeights&) = delete;
  /// Where a tensor of Bundle::places begins.
  [[nodiscard]] const std::byte* at(const Placed& place) const {
    return static_cast<const std::byte*>(memory_) + place.offset;
  }

 private:
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace tgate

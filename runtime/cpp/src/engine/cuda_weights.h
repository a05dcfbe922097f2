// A bundle's weights on a GPU, laid as graphs want them: one copy for all graphs of a session.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "contract/lowered.h"
#include "engine/cuda_runtime.h"
#include "engine/ort_library.h"

namespace tgate::ort {

/// Device memory for each of them, and a view of it for ONNX Runtime, which owns none of it. Must outlive every session
/// that was given the views.
class CudaWeights {
 public:
  /// Uploads `laid`, by the names that graphs have for them. Throws Error of Code::bundle where the weight file cannot be
  /// read, of Code::memory where the GPU has not so much memory.
  CudaWeights(const std::shared_ptr<Library>& library, const std::shared_ptr<const CudaRuntime>& cuda, const Bundle& bundle,
              const Places& places, const LaidWeights& laid, const OrtMemoryInfo* memory);

  [[nodiscard]] const std::map<std::string, Handle<OrtValue>>& values() const noexcept { return values_; }

 private:
  std::vector<DeviceMemory> blocks_;
  std::map<std::string, Handle<OrtValue>> values_;
};

}  // namespace tgate::ort

// A bundle's weights on a GPU, laid as graphs want them: one copy for all graphs of an engine.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "contract/lowered.h"
#include "engine/cuda_runtime.h"
#include "engine/ort_library.h"

namespace tgate::ort {

/// Device memory of one weight, and a view of it for ONNX Runtime, which does not own it.
struct CudaWeight {
  DeviceMemory memory;
  Handle<OrtValue> value;
};
/// What is on the device of weight files, by the file's digest and the name that graphs have for a tensor; for as long as
/// any graph has it. Under CudaRuntime::turn.
using CudaUploaded = std::map<std::pair<std::string, std::string>, std::weak_ptr<const CudaWeight>>;

/// The weights of graphs that are loaded together. Must outlive every session that was given the views.
class CudaWeights {
 public:
  /// Uploads `laid`, by the names that graphs have for them, but for what is there already; `instead`, which may be null:
  /// what is taken in place of tensors of `laid`, by the same names. Throws Error of Code::bundle where the weight file
  /// cannot be read, of Code::memory where the GPU has not so much memory.
  CudaWeights(const std::shared_ptr<Library>& library, const std::shared_ptr<const CudaRuntime>& cuda, const Bundle& bundle,
              const Places& places, const LaidWeights& laid, const Instead* instead, const OrtMemoryInfo* memory,
              CudaUploaded& uploaded);

  [[nodiscard]] const std::map<std::string, std::shared_ptr<const CudaWeight>>& values() const noexcept { return values_; }

 private:
  std::map<std::string, std::shared_ptr<const CudaWeight>> values_;
};

}  // namespace tgate::ort

// ONNX Runtime's sessions and bindings, on whatever device: what ort-cpu and ort-cuda share.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/ort_library.h"

namespace tgate::ort {

/// What both engines have. A session of theirs is one graph.
class OrtEngine : public Engine {
 public:
  [[nodiscard]] const std::string& title() const noexcept override { return title_; }
  [[nodiscard]] std::unique_ptr<Interrupt> interrupt() const override;
  [[nodiscard]] std::vector<std::shared_ptr<const LoadedGraph>> load(
      const Bundle& bundle, const std::vector<const GraphSpec*>& graphs) const override;

 protected:
  OrtEngine(const std::string& name, const EngineOptions& options);

  /// The options of a session for one graph; weights lie in the bundle's folder.
  [[nodiscard]] virtual Handle<OrtSessionOptions> session_options(const GraphSpec& graph) const = 0;
  /// Of the memory that is bound.
  [[nodiscard]] virtual Handle<OrtMemoryInfo> memory_info() const = 0;
  /// Whether the calls of a graph are captured as CUDA graphs.
  [[nodiscard]] virtual bool captured(const GraphSpec& graph) const = 0;

  std::shared_ptr<Library> library_;
  EngineOptions options_;

 private:
  std::string title_;
};

/// The engines, by their names.
std::shared_ptr<const Engine> open_cpu(const EngineOptions& options);
std::shared_ptr<const Engine> open_cuda(const EngineOptions& options);

}  // namespace tgate::ort

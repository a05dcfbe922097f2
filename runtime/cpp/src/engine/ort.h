// ONNX Runtime's sessions and bindings, on whatever device: what ort-cpu and ort-cuda share.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/ort_library.h"

namespace tgate::ort {

/// A bundle's graph, checked. Throws Error of Code::bundle.
std::string read_graph(const Bundle& bundle, const GraphSpec& spec, const Places& places);

/// What both engines have. A session of theirs is one graph.
class OrtEngine : public Engine {
 public:
  [[nodiscard]] const std::string& title() const noexcept override { return title_; }
  [[nodiscard]] std::unique_ptr<Interrupt> interrupt() const override;
 protected:
  OrtEngine(const std::string& name, const EngineOptions& options);

  /// A session of `data`, the checked file of `spec`, whose weights lie in `folder`, the bundle's. `captured`: its calls
  /// become CUDA graphs, when they are bound.
  [[nodiscard]] std::shared_ptr<const LoadedGraph> load_graph(const std::string& folder, const GraphSpec& spec,
                                                              const std::string& data, Handle<OrtSessionOptions> options,
                                                              bool captured) const;
  /// Of the memory that is bound.
  [[nodiscard]] virtual Handle<OrtMemoryInfo> memory_info() const = 0;

  std::shared_ptr<Library> library_;
  EngineOptions options_;

 private:
  std::string title_;
};

/// The engines, by their names.
std::shared_ptr<const Engine> open_cpu(const EngineOptions& options);
std::shared_ptr<const Engine> open_cuda(const EngineOptions& options);

}  // namespace tgate::ort

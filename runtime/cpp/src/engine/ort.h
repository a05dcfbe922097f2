// ONNX Runtime's sessions and bindings, on whatever device: what ort-cpu and ort-cuda share.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/ort_library.h"

namespace tgate::ort {

/// A bundle's graph, checked. Throws Error of Code::bundle.
std::string read_graph(const Bundle& bundle, const GraphSpec& spec, const Places& places);

/// Weights in the host's memory for graphs to take in place of those of their names, before they are optimised: what is
/// given as shared initializers comes too late for whatever is folded. Must outlive every session that took them.
class Given {
 public:
  Given(const std::shared_ptr<Library>& library, std::shared_ptr<const Instead> instead);
  /// Those of `names` that there are.
  void add_to(OrtSessionOptions* options, const std::vector<std::string>& names) const;

 private:
  std::shared_ptr<Library> library_;
  std::shared_ptr<const Instead> instead_;
  std::map<std::string, Handle<OrtValue>, std::less<>> values_;
};

/// What both engines have. A session of theirs is one graph.
class OrtEngine : public Engine {
 public:
  [[nodiscard]] const std::string& title() const noexcept override { return title_; }
  [[nodiscard]] std::unique_ptr<Interrupt> interrupt() const override;
 protected:
  OrtEngine(const std::string& name, const EngineOptions& options);

  /// A session of `data`, the checked file of `spec`, whose weights lie in `folder`, the bundle's. `captured`: its calls
  /// become CUDA graphs, when they are bound. `given`: what was added to the options, or null.
  [[nodiscard]] std::shared_ptr<const LoadedGraph> load_graph(const std::string& folder, const GraphSpec& spec,
                                                              const std::string& data, Handle<OrtSessionOptions> options,
                                                              bool captured, std::shared_ptr<const Given> given) const;
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

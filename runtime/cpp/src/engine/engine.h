// One interface for every engine: load graphs, hold memory, bind memory to a graph, run it.
// An engine knows graphs and memory. It knows nothing of plans, prompts or methods.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "contract/adapters.h"
#include "contract/bundle.h"

namespace tgate {

struct EngineOptions {
  std::string name = "ort-cpu";  ///< or "ort-cuda"
  std::string library;           ///< of ONNX Runtime; empty: $TGATE_ONNXRUNTIME, or libonnxruntime.so.1
  std::string memory;            ///< "fast" or "shared"; empty: the engine's choice
  int threads = 0;               ///< of one call, on a CPU; 0: the engine's choice
  int device = 0;                ///< of a GPU
  void* stream = nullptr;        ///< a cudaStream_t, the caller's; null: the engine's own
  bool cuda_graphs = false;
};

/// Ends calls from another thread. `set` may be called by any; from then on every call that is given it ends as soon as
/// the engine can, until `clear`.
class Interrupt {
 public:
  virtual ~Interrupt() = default;
  virtual void set() noexcept = 0;
  virtual void clear() = 0;
};

/// Memory of an engine's device, which it owns; zeros at first. It begins at a multiple of 64 bytes.
class DeviceBlock {
 public:
  virtual ~DeviceBlock() = default;
  [[nodiscard]] virtual std::byte* address() const noexcept = 0;
};
using DeviceMemory = std::unique_ptr<DeviceBlock>;

/// A tensor of a graph and where its first byte lies, on the device. Whoever allocated it keeps it.
struct Bound {
  const TensorSpec* tensor;
  std::byte* address;
};

/// One graph with its tensors bound. One thread at a time; calls that share no written memory may run at once.
class Call {
 public:
  virtual ~Call() = default;
  /// Runs the graph once; the outputs are written when it returns. Allocates nothing outside the engine. Throws Error of
  /// Code::engine where the engine fails, or was interrupted.
  virtual void run(Interrupt& interrupt) = 0;
};

/// One loaded graph. Immutable; any number of threads may bind and run it at once. It lives as long as any call on it.
class LoadedGraph {
 public:
  virtual ~LoadedGraph() = default;
  /// A call for so many images. `inputs` are all of the graph's; of its outputs some may be left out, all but one. The
  /// others may hold anything from then on until it runs: an engine may run it to warm up.
  [[nodiscard]] virtual std::unique_ptr<Call> bind(const std::vector<Bound>& inputs, const std::vector<Bound>& outputs,
                                                   std::int64_t images) const = 0;
};

/// What loading gives. `advice`: one line for people where the engine could do better with these graphs; or nothing.
struct Loaded {
  std::vector<std::shared_ptr<const LoadedGraph>> graphs;
  std::string advice;
};

/// Thread-safe.
class Engine {
 public:
  /// Throws Error of Code::engine where there is no such engine, or its library cannot be loaded.
  static std::shared_ptr<const Engine> open(const EngineOptions& options);

  virtual ~Engine() = default;
  /// Such as "ort-cpu 1.31.1".
  [[nodiscard]] virtual const std::string& title() const noexcept = 0;
  /// Those graphs of an opened bundle over one set of weights, each checked before the engine sees it. `instead`: weights
  /// to take in place of the file's; null for none. Throws Error of Code::bundle or Code::engine.
  [[nodiscard]] virtual Loaded load(const Bundle& bundle, const std::vector<const GraphSpec*>& graphs,
                                    std::shared_ptr<const Instead> instead) const = 0;
  [[nodiscard]] virtual std::unique_ptr<Interrupt> interrupt() const = 0;

  /// Throws Error of Code::memory.
  [[nodiscard]] virtual DeviceMemory allocate(std::size_t bytes) const = 0;
  /// Copies between host and device, and within the device; done when they return, or in the order of the engine's
  /// stream. `copy` is for pieces that do not overlap, `swap` exchanges two such.
  virtual void upload(std::byte* to, const void* from, std::size_t bytes) const = 0;
  virtual void download(void* to, const std::byte* from, std::size_t bytes) const = 0;
  virtual void copy(std::byte* to, const std::byte* from, std::size_t bytes) const = 0;
  virtual void swap(std::byte* one, std::byte* other, std::size_t bytes) const = 0;
};

}  // namespace tgate

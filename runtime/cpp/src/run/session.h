// An opened bundle on one engine: the weights, once, for every request.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "contract/bundle.h"
#include "engine/engine.h"
#include "noise/noise.h"
#include "tokenizer/tokenizer.h"

namespace tgate {

struct SessionOptions {
  EngineOptions engine;
  /// Of the bundle's, or files that `tgate plan --output` wrote, which end in .json; empty: all of the bundle's.
  std::vector<std::string> plans;
  std::vector<std::string> sizes;  ///< empty: all
};

/// What a graph around the denoiser gave: by name, each the bytes of one image's tensor in the graph's dtype.
struct HostTensor {
  Dtype dtype{};
  std::vector<std::int64_t> shape;
  std::vector<std::byte> data;

  [[nodiscard]] std::size_t elements() const { return data.size() / facts_of(dtype).bytes; }
};
using HostTensors = std::map<std::string, HostTensor, std::less<>>;

/// One graph outside the loop, at a batch of one: memory for every input and output, bound once. One thread at a time.
class GraphCall {
 public:
  GraphCall(std::shared_ptr<const Engine> engine, const LoadedGraph& graph, const GraphSpec& spec);
  /// Throws Error of Code::internal for a name that the graph does not have.
  void write(std::string_view input, const void* data, std::size_t bytes);
  void run();
  void read(std::string_view output, void* data, std::size_t bytes) const;
  [[nodiscard]] HostTensors outputs() const;

 private:
  struct Slot {
    const TensorSpec* tensor;
    DeviceMemory memory;
  };
  [[nodiscard]] const Slot& slot(const std::vector<Slot>& slots, std::string_view name) const;

  std::shared_ptr<const Engine> engine_;
  std::vector<Slot> inputs_, outputs_;
  std::unique_ptr<Call> call_;
  std::unique_ptr<Interrupt> interrupt_;
};

/// Loaded graphs and the manifest they came from. Thread-safe: open one, share it.
class Session {
 public:
  /// Checks and loads, so that what can fail fails here and not at the first step. `engine` null is the one that the
  /// options name. Throws Error.
  static std::shared_ptr<const Session> open(std::shared_ptr<const Bundle> bundle, const SessionOptions& options,
                                             std::shared_ptr<const Engine> engine = nullptr);
  ~Session();

  /// A session of the same graphs whose weights include those adapters. Graphs that they change are loaded anew; the
  /// others, and the plans and tokenizers, are this session's. Nothing of this session changes. Throws Error.
  [[nodiscard]] std::shared_ptr<const Session> adapted(const Scales& scales) const;

  [[nodiscard]] const Manifest& manifest() const { return bundle_->manifest(); }
  [[nodiscard]] const std::shared_ptr<const Engine>& engine() const { return engine_; }
  /// See Loaded.
  [[nodiscard]] const std::string& advice() const { return advice_; }
  /// A plan by its name, or by the file that the session was opened with; one that was not loaded where there is no
  /// other. Throws Error of Code::request where two that were loaded have the name, of Code::bundle listing those there
  /// are where none has.
  [[nodiscard]] const Plan& plan(std::string_view name) const;
  /// The loaded shapes of a size, smallest batches first; the first size's where it is empty. Throws Error of
  /// Code::request listing the sizes there are.
  [[nodiscard]] const std::vector<const Shape*>& shapes(std::string_view size) const;
  /// Throws Error of Code::engine where it was not loaded.
  [[nodiscard]] const LoadedGraph& graph(const GraphSpec& spec) const;
  /// Nobody has written to the weights since the session was opened. Throws Error of Code::bundle.
  void check_unchanged() const;

  /// Ids of a prompt, for each tokenizer. Throws Error of Code::request.
  [[nodiscard]] std::vector<Encoding> tokenize(std::string_view prompt) const;
  /// The text graph on ids, one vector for each tokenizer, each of its length.
  [[nodiscard]] HostTensors encode_text(const std::vector<std::vector<std::int64_t>>& ids) const;
  /// The image graph of a size on RGB pixels; noise for it is drawn from the seed.
  [[nodiscard]] HostTensors encode_picture(const Shape& shape, const std::uint8_t* pixels, std::size_t bytes,
                                           std::uint64_t seed) const;
  /// What the decoder of a size gives of one image. Throws Error of Code::request where the bundle has none.
  struct Picture {
    std::int64_t width, height, frames;
    [[nodiscard]] std::size_t bytes() const { return static_cast<std::size_t>(width * height * frames * 3); }
  };
  [[nodiscard]] Picture picture(const Shape& shape) const;
  /// The decoder of a size, from float32 latents of one image to RGB pixels.
  void decode(const Shape& shape, const float* latents, std::uint8_t* pixels, std::size_t bytes) const;

 private:
  Session() = default;
  /// Finds the plans that it is for; reads those that are files.
  void find_plans(const std::vector<std::string>& names);
  void load_tokenizers();
  void watch_weights();
  /// A graph's call, lent by `idle_` and given back.
  class Lent;
  [[nodiscard]] std::unique_ptr<GraphCall> borrow(const GraphSpec& spec) const;
  void give_back(const GraphSpec& spec, std::unique_ptr<GraphCall> call) const noexcept;

  std::shared_ptr<const Bundle> bundle_;
  std::shared_ptr<const Engine> engine_;
  std::string advice_;
  std::map<std::string, std::shared_ptr<const LoadedGraph>, std::less<>> graphs_;  // by file
  std::vector<std::pair<std::string, Plan>> plan_files_;  // by path
  std::vector<const Plan*> plans_;                        // those that it is for
  std::vector<std::string> sizes_;
  std::map<std::string, std::vector<const Shape*>, std::less<>> shapes_;
  std::vector<std::shared_ptr<const Tokenizer>> tokenizers_;
  bool adapted_ = false;
  int weights_file_ = -1;
  std::int64_t weights_bytes_ = 0, weights_written_ns_ = 0;
  mutable std::mutex guard_;
  mutable std::map<std::string, std::vector<std::unique_ptr<GraphCall>>, std::less<>> idle_;
};

/// The one graph of a role other than denoise; null where the export left it out.
const GraphSpec* find_role(const std::vector<const Shape*>& shapes, Role role);

}  // namespace tgate

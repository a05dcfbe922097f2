// ONNX Runtime on the CPU: graphs read and write host memory in place, so a step copies nothing.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "contract/error.h"
#include "engine/ort.h"

namespace tgate::ort {
namespace {

constexpr std::size_t alignment = 64;  // a cache line, and the widest vector register

class HostBlock final : public DeviceBlock {
 public:
  explicit HostBlock(std::size_t bytes) {
    // calloc gives pages that are zeros already, and only costs those that are touched; 0 bytes are an address too.
    const std::size_t whole = bytes + alignment;
    memory_ = whole < bytes ? nullptr : std::calloc(whole, 1);
    if (memory_ == nullptr) {
      throw Error(Code::memory, "there is no memory for " + std::to_string(bytes) +
                                    " bytes; ask for fewer images at once, or a smaller size");
    }
  }
  ~HostBlock() override { std::free(memory_); }
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;
  [[nodiscard]] std::byte* address() const noexcept override {
    const auto start = reinterpret_cast<std::uintptr_t>(memory_);
    return reinterpret_cast<std::byte*>((start + alignment - 1) / alignment * alignment);
  }

 private:
  void* memory_;
};

int most_threads() { return std::max(64, 8 * static_cast<int>(std::thread::hardware_concurrency())); }

class OrtCpu final : public OrtEngine {
 public:
  explicit OrtCpu(const EngineOptions& options) : OrtEngine("ort-cpu", options) {
    if (options_.memory.empty()) {
      options_.memory = "fast";
    }
    if (options_.memory != "fast" && options_.memory != "shared") {
      throw Error(Code::engine, "memory must be one of shared, fast, got '" + shown(options_.memory) + "'");
    }
    if (options_.threads < 0 || options_.threads > most_threads()) {
      throw Error(Code::engine, "threads must be 0, the engine's choice, or 1 to " + std::to_string(most_threads()) +
                                    ", got " + std::to_string(options_.threads));
    }
    if (options_.stream != nullptr || options_.cuda_graphs || options_.device != 0) {
      throw Error(Code::engine, "ort-cpu has no device, stream or CUDA graphs; leave them out, or take ort-cuda");
    }
    if (options_.memory == "shared") {
      library_->share_arena();
    }
  }

  [[nodiscard]] Loaded load(const Bundle& bundle, const std::vector<const GraphSpec*>& graphs,
                            std::shared_ptr<const Instead> instead) const override {
    const Places places = bundle.places();
    const auto given = instead ? std::make_shared<const Given>(library_, std::move(instead)) : nullptr;
    Loaded loaded;
    for (const GraphSpec* spec : graphs) {
      const std::string data = read_graph(bundle, *spec, places);
      auto options = session_options(*spec);
      if (given) given->add_to(options.get(), weights_of(data).names);
      loaded.graphs.push_back(load_graph(bundle.path(), *spec, data, std::move(options), false, given));
    }
    return loaded;
  }

  [[nodiscard]] DeviceMemory allocate(std::size_t bytes) const override { return std::make_unique<HostBlock>(bytes); }
  void upload(std::byte* to, const void* from, std::size_t bytes) const override { move(to, from, bytes); }
  void download(void* to, const std::byte* from, std::size_t bytes) const override { move(to, from, bytes); }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) const override { move(to, from, bytes); }
  void swap(std::byte* one, std::byte* other, std::size_t bytes) const override {
    std::swap_ranges(one, one + bytes, other);
  }

 protected:
  [[nodiscard]] Handle<OrtMemoryInfo> memory_info() const override {
    OrtMemoryInfo* info = nullptr;
    library_->check(library_->api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &info),
                    "ONNX Runtime does not name its memory");
    return {info, Release{library_}};
  }

 private:
  [[nodiscard]] Handle<OrtSessionOptions> session_options(const GraphSpec& graph) const {
    const OrtApi& api = library_->api();
    const std::string what = "ONNX Runtime does not take the settings for " + graph.file;
    OrtSessionOptions* made = nullptr;
    library_->check(api.CreateSessionOptions(&made), what);
    Handle<OrtSessionOptions> options(made, Release{library_});
    library_->check(api.SetSessionExecutionMode(made, ORT_SEQUENTIAL), what);
    library_->check(api.SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_FATAL), what);
    if (options_.threads > 0) {
      library_->check(api.SetIntraOpNumThreads(made, options_.threads), what);
    }
    // Each graph has a pool of threads, and a trajectory changes graphs: idle ones that spin take the cores from the
    // pool at work.
    library_->check(api.AddSessionConfigEntry(made, "session.intra_op.allow_spinning", "0"), what);
    if (options_.memory == "shared") {
      // The last level rewrites convolutions, and their weights, to another layout; prepacking copies the rest.
      library_->check(api.SetSessionGraphOptimizationLevel(made, ORT_ENABLE_EXTENDED), what);
      library_->check(api.AddSessionConfigEntry(made, "session.disable_prepacking", "1"), what);
      library_->check(api.AddSessionConfigEntry(made, "session.use_env_allocators", "1"), what);
      library_->check(api.DisableMemPattern(made), what);
    } else {
      library_->check(api.SetSessionGraphOptimizationLevel(made, ORT_ENABLE_ALL), what);
    }
    return options;
  }

  static void move(void* to, const void* from, std::size_t bytes) noexcept {
    if (bytes > 0) {
      std::memcpy(to, from, bytes);
    }
  }
};

}  // namespace

std::shared_ptr<const Engine> open_cpu(const EngineOptions& options) { return std::make_shared<OrtCpu>(options); }

}  // namespace tgate::ort

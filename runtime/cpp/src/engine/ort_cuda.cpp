// ONNX Runtime on an NVIDIA GPU: everything stays on the device, and steps can be replayed as CUDA graphs.
//
// NO GPU HAS RUN THIS YET. It compiles, and follows what the Python engine of the same name does.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <map>
#include <thread>

#include "contract/error.h"
#include "engine/cuda_runtime.h"
#include "engine/ort.h"

namespace tgate::ort {
namespace {

constexpr std::uintptr_t alignment = 16;  // what a kernel may read at a time

class CudaBlock final : public DeviceBlock {
 public:
  CudaBlock(std::shared_ptr<const CudaRuntime> cuda, std::size_t bytes)
      : cuda_(std::move(cuda)), address_(cuda_->allocate(bytes)) {}
  ~CudaBlock() override { cuda_->free(address_); }
  CudaBlock(const CudaBlock&) = delete;
  CudaBlock& operator=(const CudaBlock&) = delete;
  [[nodiscard]] std::byte* address() const noexcept override { return static_cast<std::byte*>(address_); }

 private:
  std::shared_ptr<const CudaRuntime> cuda_;
  void* address_;
};

/// A call on memory that kernels may take: what begins at another address, or is bound nowhere though a captured graph
/// writes all of its outputs, has a place of its own, and is copied around the call.
class CudaCall final : public Call {
 public:
  struct Pair {
    std::byte *to, *from;
    std::size_t bytes;
  };
  CudaCall(std::shared_ptr<const CudaRuntime> cuda, std::unique_ptr<Call> call, std::vector<DeviceMemory> own,
           std::vector<Pair> before, std::vector<Pair> after, bool captured)
      : cuda_(std::move(cuda)),
        call_(std::move(call)),
        own_(std::move(own)),
        before_(std::move(before)),
        after_(std::move(after)),
        captured_(captured),
        thread_(std::this_thread::get_id()) {}

  void run(Interrupt& interrupt) override {
    if (captured_ && std::this_thread::get_id() != thread_) {
      // ONNX Runtime keeps a CUDA graph with the thread that captured it.
      throw Error(Code::engine, "with cuda_graphs all requests of a session run in the thread that made them");
    }
    for (const Pair& pair : before_) {
      cuda_->copy(pair.to, pair.from, pair.bytes);
    }
    cuda_->wait();
    call_->run(interrupt);
    for (const Pair& pair : after_) {
      cuda_->copy(pair.to, pair.from, pair.bytes);
    }
  }

 private:
  std::shared_ptr<const CudaRuntime> cuda_;
  std::unique_ptr<Call> call_;
  std::vector<DeviceMemory> own_;
  std::vector<Pair> before_, after_;
  bool captured_;
  std::thread::id thread_;
};

class CudaGraph final : public LoadedGraph {
 public:
  CudaGraph(std::shared_ptr<const CudaRuntime> cuda, std::shared_ptr<const LoadedGraph> graph, const GraphSpec& spec,
            bool captured)
      : cuda_(std::move(cuda)), graph_(std::move(graph)), spec_(spec), captured_(captured) {}

  [[nodiscard]] std::unique_ptr<Call> bind(const std::vector<Bound>& inputs, const std::vector<Bound>& outputs,
                                           std::int64_t images) const override {
    std::vector<DeviceMemory> own;
    std::vector<CudaCall::Pair> before, after;
    const auto own_place = [&](const TensorSpec& tensor) {
      own.push_back(std::make_unique<CudaBlock>(cuda_, static_cast<std::size_t>(tensor.bytes(images))));
      return own.back()->address();
    };
    std::vector<Bound> reads, writes;
    for (const Bound& bound : inputs) {
      std::byte* place = bound.address;
      if (reinterpret_cast<std::uintptr_t>(place) % alignment != 0) {
        place = own_place(*bound.tensor);
        before.push_back({place, bound.address, static_cast<std::size_t>(bound.tensor->bytes(images))});
      }
      reads.push_back({bound.tensor, place});
    }
    for (const TensorSpec& tensor : spec_.outputs) {
      const Bound* bound = nullptr;
      for (const Bound& each : outputs) {
        bound = each.tensor->name == tensor.name ? &each : bound;
      }
      if (bound == nullptr && !captured_) {
        continue;
      }
      std::byte* place = bound == nullptr ? nullptr : bound->address;
      if (place == nullptr || reinterpret_cast<std::uintptr_t>(place) % alignment != 0) {
        place = own_place(tensor);
        if (bound != nullptr) {
          after.push_back({bound->address, place, static_cast<std::size_t>(tensor.bytes(images))});
        }
      }
      writes.push_back({&tensor, place});
    }
    return std::make_unique<CudaCall>(cuda_, graph_->bind(reads, writes, images), std::move(own), std::move(before),
                                      std::move(after), captured_);
  }

 private:
  std::shared_ptr<const CudaRuntime> cuda_;
  std::shared_ptr<const LoadedGraph> graph_;
  GraphSpec spec_;
  bool captured_;
};

class OrtCuda final : public OrtEngine {
 public:
  explicit OrtCuda(const EngineOptions& options) : OrtEngine("ort-cuda", options) {
    if (options_.memory.empty()) {
      options_.memory = "shared";
    }
    if (options_.memory != "fast" && options_.memory != "shared") {
      throw Error(Code::engine, "memory must be one of shared, fast, got '" + shown(options_.memory) + "'");
    }
    if (options_.threads != 0 || options_.device < 0) {
      throw Error(Code::engine, "ort-cuda computes on a GPU: threads must be 0, and device a GPU's number, from 0");
    }
    // Appending the provider loads its library, and with it the CUDA runtime.
    static_cast<void>(with_provider(false));
    cuda_ = std::make_shared<const CudaRuntime>(options_.device, options_.stream);
  }
  ~OrtCuda() override { values_.clear(); }

  [[nodiscard]] std::vector<std::shared_ptr<const LoadedGraph>> load(
      const Bundle& bundle, const std::vector<const GraphSpec*>& graphs) const override {
    if (options_.memory == "shared") {
      upload_weights(bundle);
    }
    auto loaded = OrtEngine::load(bundle, graphs);
    for (std::size_t i = 0; i < graphs.size(); ++i) {
      loaded[i] = std::make_shared<CudaGraph>(cuda_, loaded[i], *graphs[i], captured(*graphs[i]));
    }
    return loaded;
  }

  [[nodiscard]] DeviceMemory allocate(std::size_t bytes) const override { return std::make_unique<CudaBlock>(cuda_, bytes); }
  void upload(std::byte* to, const void* from, std::size_t bytes) const override {
    cuda_->copy(to, from, bytes);
    cuda_->wait();  // the caller may write to what it gave again
  }
  void download(void* to, const std::byte* from, std::size_t bytes) const override {
    cuda_->copy(to, from, bytes);
    cuda_->wait();
  }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) const override { cuda_->copy(to, from, bytes); }
  void swap(std::byte* one, std::byte* other, std::size_t bytes) const override {
    const CudaBlock between(cuda_, bytes);
    cuda_->copy(between.address(), one, bytes);
    cuda_->copy(one, other, bytes);
    cuda_->copy(other, between.address(), bytes);
    cuda_->wait();
  }

 protected:
  [[nodiscard]] Handle<OrtSessionOptions> session_options(const GraphSpec& graph) const override {
    const OrtApi& api = library_->api();
    const std::string what = "ONNX Runtime does not take the settings for " + graph.file;
    Handle<OrtSessionOptions> options = with_provider(captured(graph));
    library_->check(api.SetSessionExecutionMode(options.get(), ORT_SEQUENTIAL), what);
    library_->check(api.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_FATAL), what);
    library_->check(api.SetSessionGraphOptimizationLevel(options.get(), ORT_ENABLE_ALL), what);
    if (!values_.empty()) {
      library_->check(api.AddSessionConfigEntry(options.get(), "session.disable_prepacking", "1"), what);
    }
    for (const auto& [name, value] : values_) {
      library_->check(api.AddInitializer(options.get(), name.c_str(), value.get()), what);
    }
    return options;
  }

  [[nodiscard]] Handle<OrtMemoryInfo> memory_info() const override {
    OrtMemoryInfo* info = nullptr;
    library_->check(library_->api().CreateMemoryInfo("Cuda", OrtDeviceAllocator, options_.device, OrtMemTypeDefault, &info),
                    "ONNX Runtime does not name its memory");
    return {info, Release{library_}};
  }

  [[nodiscard]] bool captured(const GraphSpec& graph) const override {
    return options_.cuda_graphs && graph.role == Role::denoise;
  }

 private:
  [[nodiscard]] Handle<OrtSessionOptions> with_provider(bool captured) const {
    const OrtApi& api = library_->api();
    const std::string what = "ort-cuda finds no GPU " + std::to_string(options_.device) + " here";
    OrtSessionOptions* made = nullptr;
    library_->check(api.CreateSessionOptions(&made), what);
    Handle<OrtSessionOptions> options(made, Release{library_});
    OrtCUDAProviderOptionsV2* settings = nullptr;
    library_->check(api.CreateCUDAProviderOptions(&settings), what);
    const Handle<OrtCUDAProviderOptionsV2> held(settings, Release{library_});
    const std::string device = std::to_string(options_.device);
    // TF32 has 10 bits of mantissa, which is not what a bundle in float32 was exported for.
    const char* keys[] = {"device_id", "arena_extend_strategy", "use_tf32", "enable_cuda_graph"};
    const char* values[] = {device.c_str(), "kSameAsRequested", "0", captured ? "1" : "0"};
    library_->check(api.UpdateCUDAProviderOptions(settings, keys, values, 4), what);
    if (options_.stream != nullptr) {
      library_->check(api.UpdateCUDAProviderOptionsWithValue(settings, "user_compute_stream", options_.stream), what);
    }
    library_->check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(made, settings), what);
    return options;
  }

  /// Every weight of the bundle on the device, by its initializer's name.
  void upload_weights(const Bundle& bundle) const {
    const std::string path = bundle.path() + "/" + bundle.manifest().weights;
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat found {};
    if (file < 0 || fstat(file, &found) != 0) {
      throw Error(Code::bundle, path + " cannot be opened; copy or export the bundle again");
    }
    const auto size = static_cast<std::size_t>(found.st_size);
    void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    ::close(file);
    if (mapped == MAP_FAILED) {
      throw Error(Code::memory, path + " cannot be mapped");
    }
    const Handle<OrtMemoryInfo> info = memory_info();
    try {
      for (const auto& [name, place] : bundle.places()) {
        weights_.push_back(std::make_unique<CudaBlock>(cuda_, static_cast<std::size_t>(place.length)));
        std::byte* to = weights_.back()->address();
        cuda_->copy(to, static_cast<const std::byte*>(mapped) + place.offset, static_cast<std::size_t>(place.length));
        OrtValue* value = nullptr;
        library_->check(library_->api().CreateTensorWithDataAsOrtValue(
                            info.get(), to, static_cast<std::size_t>(place.length), place.shape.data(), place.shape.size(),
                            static_cast<ONNXTensorElementDataType>(facts_of(place.dtype).onnx), &value),
                        "ONNX Runtime cannot take weight " + shown(name));
        values_.emplace(name, Handle<OrtValue>(value, Release{library_}));
      }
      cuda_->wait();
    } catch (...) {
      munmap(mapped, size);
      throw;
    }
    munmap(mapped, size);
  }

  std::shared_ptr<const CudaRuntime> cuda_;
  mutable std::vector<DeviceMemory> weights_;  // filled by the one load there is
  mutable std::map<std::string, Handle<OrtValue>> values_;
};

}  // namespace

std::shared_ptr<const Engine> open_cuda(const EngineOptions& options) { return std::make_shared<OrtCuda>(options); }

}  // namespace tgate::ort

// ONNX Runtime on an NVIDIA GPU: everything stays on the device, and steps can be replayed as CUDA graphs.
//
// Graphs are taken lowered for CUDA's kernels where `tgate build` has left them so in the bundle's folder. All of them work
// in one arena; weights and buffers, which last, lie elsewhere: a captured graph writes to its places in the arena at each
// replay, whatever has them by then.
//
// SDXL ran so on an H200 (docs/gpu.md). The tests have a stub of CUDA, which computes nothing.
#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <thread>

#include "contract/error.h"
#include "contract/lowered.h"
#include "engine/cuda_runtime.h"
#include "engine/cuda_weights.h"
#include "engine/ort.h"

namespace tgate::ort {
namespace {

constexpr std::uintptr_t alignment = 16;  // what a kernel may read at a time

class CudaGraph;

/// A call on memory that kernels may take: what begins at another address, or is bound nowhere though a captured graph
/// writes all of its outputs, has a place that calls share, and is copied around the call.
class CudaCall final : public Call {
 public:
  struct Pair {
    std::byte *to, *from;
    std::size_t bytes;
  };
  CudaCall(std::shared_ptr<const CudaRuntime> cuda, std::shared_ptr<const CudaGraph> graph, std::unique_ptr<Call> call,
           std::vector<Pair> before, std::vector<Pair> after, bool captured)
      : cuda_(std::move(cuda)),
        graph_(std::move(graph)),
        call_(std::move(call)),
        before_(std::move(before)),
        after_(std::move(after)),
        captured_(captured),
        thread_(std::this_thread::get_id()) {}
  ~CudaCall() override {
    const auto held = CudaRuntime::turn();
    call_.reset();
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  void run(Interrupt& interrupt) override {
    if (captured_ && std::this_thread::get_id() != thread_) {
      // ONNX Runtime keeps a CUDA graph with the thread that captured it.
      throw Error(Code::engine, "with cuda_graphs all requests of a session run in the thread that made them");
    }
    const auto held = CudaRuntime::turn();
    copy(before_);
    cuda_->wait();  // ONNX Runtime's streams do not wait for ours
    call_->run(interrupt);
    copy(after_);
  }

 private:
  void copy(const std::vector<Pair>& pairs) const {
    for (const Pair& pair : pairs) {
      cuda_->copy(pair.to, pair.from, pair.bytes);
    }
  }

  std::shared_ptr<const CudaRuntime> cuda_;
  std::shared_ptr<const CudaGraph> graph_;  // and with it the weights
  std::unique_ptr<Call> call_;
  std::vector<Pair> before_, after_;
  bool captured_;
  std::thread::id thread_;
};

/// A graph's sessions: with all of its outputs, and, where calls are captured, with those alone that a call wants, which are
/// made when one is first bound.
class CudaGraph final : public LoadedGraph, public std::enable_shared_from_this<CudaGraph> {
 public:
  using Load = std::function<std::shared_ptr<const LoadedGraph>(const LoweredGraph&)>;
  /// `variants`: the first one has all outputs. `load`: makes a session; it is called under CudaRuntime::turn, now for the
  /// first one, so that what cannot be loaded is told.
  CudaGraph(std::shared_ptr<const CudaRuntime> cuda, std::shared_ptr<const CudaWeights> weights,
            std::vector<LoweredGraph> variants, Load load, bool captured)
      : cuda_(std::move(cuda)),
        weights_(std::move(weights)),
        variants_(std::move(variants)),
        load_(std::move(load)),
        sessions_(variants_.size()),
        captured_(captured) {
    sessions_.front() = load_(variants_.front());
  }
  ~CudaGraph() override {
    const auto held = CudaRuntime::turn();
    sessions_.clear();
    load_ = nullptr;  // it has the weights as well, which may be freed in a turn alone
    weights_.reset();
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  [[nodiscard]] std::unique_ptr<Call> bind(const std::vector<Bound>& inputs, const std::vector<Bound>& outputs,
                                           std::int64_t images) const override {
    const auto held = CudaRuntime::turn();
    const std::size_t variant = variant_for(outputs);
    if (sessions_[variant] == nullptr) {
      sessions_[variant] = load_(variants_[variant]);
    }
    std::vector<CudaCall::Pair> before, after;
    std::vector<Bound> reads, writes;
    for (const Bound& bound : inputs) {
      std::byte* place = place_for(*bound.tensor, bound.address, images);
      if (place != bound.address) {
        before.push_back({place, bound.address, static_cast<std::size_t>(bound.tensor->bytes(images))});
      }
      reads.push_back({bound.tensor, place});
    }
    for (const TensorSpec& tensor : variants_[variant].spec.outputs) {
      const auto bound = std::find_if(outputs.begin(), outputs.end(),
                                      [&](const Bound& each) { return each.tensor->name == tensor.name; });
      std::byte* address = bound == outputs.end() ? nullptr : bound->address;
      if (address == nullptr && !captured_) {
        continue;
      }
      // A captured graph writes each of its outputs to a fixed place.
      std::byte* place = place_for(tensor, address, images);
      if (address != nullptr && place != address) {
        after.push_back({address, place, static_cast<std::size_t>(tensor.bytes(images))});
      }
      writes.push_back({&tensor, place});
    }
    cuda_->wait();  // a captured graph runs when it is bound, and memory is cleared in our stream
    return std::make_unique<CudaCall>(cuda_, shared_from_this(), sessions_[variant]->bind(reads, writes, images),
                                      std::move(before), std::move(after), captured_);
  }

 private:
  /// What has those outputs and no others, or all.
  [[nodiscard]] std::size_t variant_for(const std::vector<Bound>& outputs) const {
    for (std::size_t i = captured_ ? 0 : variants_.size(); i < variants_.size(); ++i) {
      const std::vector<TensorSpec>& own = variants_[i].spec.outputs;
      const bool fits = std::all_of(own.begin(), own.end(), [&](const TensorSpec& tensor) {
        return std::any_of(outputs.begin(), outputs.end(), [&](const Bound& each) { return each.tensor->name == tensor.name; });
      });
      if (fits && own.size() == outputs.size()) {
        return i;
      }
    }
    return 0;
  }

  /// What the graph reads or writes: that address, or memory that calls share where there is none, or where kernels may not
  /// take it. Calls run one at a time.
  std::byte* place_for(const TensorSpec& tensor, std::byte* address, std::int64_t images) const {
    if (address != nullptr && reinterpret_cast<std::uintptr_t>(address) % alignment == 0) {
      return address;
    }
    DeviceMemory& spare = spare_[{tensor.name, images}];
    if (spare == nullptr) {
      spare = std::make_unique<CudaBlock>(cuda_, static_cast<std::size_t>(tensor.bytes(images)));
    }
    return spare->address();
  }

  std::shared_ptr<const CudaRuntime> cuda_;
  std::shared_ptr<const CudaWeights> weights_;
  std::vector<LoweredGraph> variants_;
  Load load_;
  mutable std::vector<std::shared_ptr<const LoadedGraph>> sessions_;  // of variants; these two under CudaRuntime::turn
  mutable std::map<std::pair<std::string, std::int64_t>, DeviceMemory> spare_;
  bool captured_;
};

/// What ONNX Runtime logs in this thread while there is one.
class Listening {
 public:
  Listening() { heard_ = &lines_; }
  ~Listening() { heard_ = nullptr; }
  Listening(const Listening&) = delete;
  Listening& operator=(const Listening&) = delete;
  [[nodiscard]] const std::vector<std::string>& lines() const noexcept { return lines_; }
  static void ORT_API_CALL hear(void*, OrtLoggingLevel, const char*, const char*, const char*, const char* message) {
    if (heard_ != nullptr && message != nullptr) {
      heard_->emplace_back(message);
    }
  }

 private:
  std::vector<std::string> lines_;
  static thread_local std::vector<std::string>* heard_;
};
thread_local std::vector<std::string>* Listening::heard_ = nullptr;

class OrtCuda final : public OrtEngine, public std::enable_shared_from_this<OrtCuda> {
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
    const auto held = CudaRuntime::turn();
    // Appending the provider loads its library, and with it the CUDA runtime.
    static_cast<void>(with_provider(false, false));
    cuda_ = std::make_shared<const CudaRuntime>(options_.device, options_.stream);
    library_->share_arena(options_.device);
  }

  [[nodiscard]] Loaded load(const Bundle& bundle, const std::vector<const GraphSpec*>& graphs,
                            std::shared_ptr<const Instead> instead) const override {
    const Places places = bundle.places();
    const auto lowered = LoweredGraphs::open(bundle);
    std::vector<std::vector<LoweredGraph>> variants;
    LaidWeights laid;
    std::size_t as_exported = 0;
    for (const GraphSpec* spec : graphs) {
      variants.push_back(lowered ? lowered->find(bundle, *spec, places) : std::vector<LoweredGraph>{});
      if (variants.back().empty()) {
        ++as_exported;
        variants.back().push_back({*spec, read_graph(bundle, *spec, places), {}});
      }
      for (const LoweredGraph& graph : variants.back()) {
        add_weights(graph, places, instead.get(), laid);
      }
    }
    std::shared_ptr<const Instead> changed = instead ? laid_as_graphs_want(*instead, places, laid) : nullptr;
    const auto given = changed ? std::make_shared<const Given>(library_, changed) : nullptr;
    const auto held = CudaRuntime::turn();
    const Handle<OrtMemoryInfo> memory = memory_info();
    const auto weights = std::make_shared<const CudaWeights>(library_, cuda_, bundle, places, laid, changed.get(),
                                                             memory.get(), uploaded_);
    Loaded loaded;
    for (std::vector<LoweredGraph>& each : variants) {
      const bool captured = options_.cuda_graphs && each.front().spec.role == Role::denoise;
      auto load = [self = shared_from_this(), folder = bundle.path(), weights, given, captured](const LoweredGraph& graph) {
        const Listening listening;
        const GraphWeights facts = weights_of(graph.data);
        auto options = self->session_options(graph.spec, *weights, captured, facts.half);
        if (given) given->add_to(options.get(), facts.names);
        auto made = self->load_graph(folder, graph.spec, graph.data, std::move(options), captured, given);
        refuse_copies(graph.spec, listening.lines());
        return made;
      };
      loaded.graphs.push_back(std::make_shared<CudaGraph>(cuda_, weights, std::move(each), std::move(load), captured));
    }
    if (as_exported > 0) {
      loaded.advice = "ort-cuda takes " + std::to_string(as_exported) + " of " + std::to_string(graphs.size()) +
                      " graphs as they were exported, which launches more kernels; where Python is, tgate build BUNDLE "
                      "--engine ort-cuda lowers them";
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
  [[nodiscard]] Handle<OrtMemoryInfo> memory_info() const override {
    OrtMemoryInfo* info = nullptr;
    library_->check(library_->api().CreateMemoryInfo("Cuda", OrtDeviceAllocator, options_.device, OrtMemTypeDefault, &info),
                    "ONNX Runtime does not name its memory");
    return {info, Release{library_}};
  }

 private:
  [[nodiscard]] Handle<OrtSessionOptions> session_options(const GraphSpec& graph, const CudaWeights& weights, bool captured,
                                                          bool half) const {
    const OrtApi& api = library_->api();
    const std::string what = "ONNX Runtime does not take the settings for " + graph.file;
    Handle<OrtSessionOptions> options = with_provider(captured, half);
    library_->check(api.SetSessionExecutionMode(options.get(), ORT_SEQUENTIAL), what);
    // Warnings, to us alone: where a weight is copied, one says so.
    library_->check(api.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_WARNING), what);
    library_->check(api.SetUserLoggingFunction(options.get(), &Listening::hear, nullptr), what);
    library_->check(api.SetSessionGraphOptimizationLevel(options.get(), ORT_ENABLE_ALL), what);
    // One arena for what graphs work in, and nothing in it that is to last. Prepacking stays on: by being asked, NhwcConv
    // learns that its weights lie as it wants them, and nothing that a graph holds packs any on CUDA.
    library_->check(api.AddSessionConfigEntry(options.get(), "session.use_env_allocators", "1"), what);
    library_->check(api.AddSessionConfigEntry(options.get(), "session.use_device_allocator_for_initializers", "1"), what);
    // ONNX Runtime would make a Gemm of a product and its bias, for which it writes the bias out whole first.
    const char* left_out = "MatMulAddFusion";
    library_->check(api.AddSessionConfigEntry(options.get(), "optimization.disable_specified_optimizers", left_out), what);
    for (const auto& [name, value] : weights.values()) {
      library_->check(api.AddInitializer(options.get(), name.c_str(), value->value.get()), what);
    }
    return options;
  }

  [[nodiscard]] Handle<OrtSessionOptions> with_provider(bool captured, bool half) const {
    const OrtApi& api = library_->api();
    const std::string what = "ort-cuda finds no GPU " + std::to_string(options_.device) + " here";
    OrtSessionOptions* made = nullptr;
    library_->check(api.CreateSessionOptions(&made), what);
    Handle<OrtSessionOptions> options(made, Release{library_});
    OrtCUDAProviderOptionsV2* settings = nullptr;
    library_->check(api.CreateCUDAProviderOptions(&settings), what);
    const Handle<OrtCUDAProviderOptionsV2> held(settings, Release{library_});
    const std::string device = std::to_string(options_.device);
    // TF32's 10 bits of mantissa are not what a graph in float32 was exported for. In 16 bits there is nothing to lose, and
    // ONNX Runtime takes the setting for more than it says: no convolution may then use tensor cores.
    // Convolutions are chosen by the newer of cuDNN's two heuristics.
    const char* keys[] = {"device_id", "arena_extend_strategy", "use_tf32", "cudnn_conv_algo_search", "enable_cuda_graph"};
    const char* values[] = {device.c_str(), "kSameAsRequested", half ? "1" : "0", "HEURISTIC", captured ? "1" : "0"};
    library_->check(api.UpdateCUDAProviderOptions(settings, keys, values, 5), what);
    if (options_.stream != nullptr) {
      library_->check(api.UpdateCUDAProviderOptionsWithValue(settings, "user_compute_stream", options_.stream), what);
    }
    library_->check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(made, settings), what);
    return options;
  }

  /// What is to be uploaded for a graph. Throws Error.
  void add_weights(const LoweredGraph& graph, const Places& places, const Instead* instead, LaidWeights& laid) const {
    const GraphWeights facts = weights_of(graph.data);
    refuse_bfloat16(graph.spec, facts);
    for (const std::string& name : facts.names) {
      const auto turned = graph.weights.find(name);
      if (turned != graph.weights.end()) {
        laid.emplace(name, turned->second);  // the name says how
      } else if (options_.memory == "shared" || (instead != nullptr && instead->find(name) != instead->end())) {
        laid.emplace(name, Laid{name, {}, places.at(name).dtype});
      }
    }
  }

  /// Changed weights by the names, and in the layouts, that graphs have for them.
  static std::shared_ptr<const Instead> laid_as_graphs_want(const Instead& instead, const Places& places,
                                                            const LaidWeights& laid) {
    auto all = std::make_shared<Instead>();
    for (const auto& [name, each] : laid) {
      const auto found = instead.find(each.source);
      if (found == instead.end()) continue;
      const Placed made = place_of(each, places);
      HostWeight weight{made.dtype, made.shape, std::vector<std::byte>(static_cast<std::size_t>(made.length))};
      lay(each, places.at(each.source), found->second.data.data(), weight.data.data());
      all->emplace(name, std::move(weight));
    }
    return all;
  }

  /// A U-Net's or a decoder's: what both have, ONNX Runtime has no kernel for in bfloat16, on any device.
  static void refuse_bfloat16(const GraphSpec& spec, const GraphWeights& weights) {
    if (weights.bfloat && weights.resizes) {
      throw Error(Code::engine, spec.file + " is in bfloat16, in which ONNX Runtime has no Resize; export with --dtype fp16");
    }
  }

  static void refuse_copies(const GraphSpec& spec, const std::vector<std::string>& lines) {
    const auto copied = [](const std::string& line) {
      return line.find("Cannot use user supplied initializer") != std::string::npos;
    };
    const auto first = std::find_if(lines.begin(), lines.end(), copied);
    if (first != lines.end()) {
      throw Error(Code::engine, "ONNX Runtime copied " + std::to_string(std::count_if(first, lines.end(), copied)) +
                                    " weights of " + spec.file + " instead of sharing them: " + shown(*first, 300) +
                                    "; take memory fast");
    }
  }

  std::shared_ptr<const CudaRuntime> cuda_;
  mutable CudaUploaded uploaded_;
};

}  // namespace

std::shared_ptr<const Engine> open_cuda(const EngineOptions& options) { return std::make_shared<OrtCuda>(options); }

}  // namespace tgate::ort

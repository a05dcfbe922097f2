#include "engine/ort.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "contract/error.h"

namespace tgate::ort {
namespace {

const std::string making_a_call = "ONNX Runtime cannot bind a graph";

class RunInterrupt final : public Interrupt {
 public:
  explicit RunInterrupt(const std::shared_ptr<Library>& library) : options_(nullptr, Release{library}) {
    OrtRunOptions* options = nullptr;
    library->check(library->api().CreateRunOptions(&options), making_a_call);
    options_.reset(options);
  }
  // Neither can fail, but for want of an object.
  void set() noexcept override { ignore(api().RunOptionsSetTerminate(options_.get())); }
  void clear() override { ignore(api().RunOptionsUnsetTerminate(options_.get())); }
  [[nodiscard]] OrtRunOptions* get() const noexcept { return options_.get(); }

 private:
  [[nodiscard]] const OrtApi& api() const noexcept { return options_.get_deleter().library->api(); }
  void ignore(OrtStatus* status) const noexcept {
    if (status != nullptr) {
      api().ReleaseStatus(status);
    }
  }

  Handle<OrtRunOptions> options_;
};

class OrtGraph;

class OrtCall final : public Call {
 public:
  OrtCall(std::shared_ptr<const OrtGraph> graph, const std::vector<Bound>& inputs, const std::vector<Bound>& outputs,
          std::int64_t images);
  void run(Interrupt& interrupt) override;

 private:
  void run_bound(OrtRunOptions* options);

  std::shared_ptr<const OrtGraph> graph_;
  std::vector<Handle<OrtValue>> values_;
  Handle<OrtIoBinding> binding_;
  Handle<OrtRunOptions> own_options_;  // of a captured call, which its number belongs to
};

class OrtGraph final : public LoadedGraph, public std::enable_shared_from_this<OrtGraph> {
 public:
  OrtGraph(const std::shared_ptr<Library>& its_library, const std::string& its_file, Handle<OrtSession> its_session,
           Handle<OrtMemoryInfo> its_memory, bool is_captured, std::shared_ptr<const Given> its_given)
      : library(its_library),
        file(its_file),
        given(std::move(its_given)),
        session(std::move(its_session)),
        memory(std::move(its_memory)),
        captured(is_captured) {}

  [[nodiscard]] std::unique_ptr<Call> bind(const std::vector<Bound>& inputs, const std::vector<Bound>& outputs,
                                           std::int64_t images) const override {
    return std::make_unique<OrtCall>(shared_from_this(), inputs, outputs, images);
  }

  std::shared_ptr<Library> library;
  std::string file;
  std::shared_ptr<const Given> given;  // which the session reads
  Handle<OrtSession> session;
  Handle<OrtMemoryInfo> memory;
  bool captured;
};

OrtCall::OrtCall(std::shared_ptr<const OrtGraph> graph, const std::vector<Bound>& inputs,
                 const std::vector<Bound>& outputs, std::int64_t images)
    : graph_(std::move(graph)),
      binding_(nullptr, Release{graph_->library}),
      own_options_(nullptr, Release{graph_->library}) {
  const Library& library = *graph_->library;
  const OrtApi& api = library.api();
  OrtIoBinding* binding = nullptr;
  library.check(api.CreateIoBinding(graph_->session.get(), &binding), making_a_call);
  binding_.reset(binding);
  for (const auto* bounds : {&inputs, &outputs}) {
    for (const Bound& bound : *bounds) {
      const TensorSpec& tensor = *bound.tensor;
      std::vector<std::int64_t> shape = tensor.shape;
      std::replace_if(shape.begin(), shape.end(), [](std::int64_t size) { return size < 0; }, images);
      OrtValue* value = nullptr;
      library.check(api.CreateTensorWithDataAsOrtValue(
                        graph_->memory.get(), bound.address, static_cast<std::size_t>(tensor.bytes(images)),
                        shape.data(), shape.size(),
                        static_cast<ONNXTensorElementDataType>(facts_of(tensor.dtype).onnx), &value),
                    making_a_call);
      values_.emplace_back(value, Release{graph_->library});
      library.check(bounds == &inputs ? api.BindInput(binding, tensor.name.c_str(), value)
                                      : api.BindOutput(binding, tensor.name.c_str(), value),
                    making_a_call);
    }
  }
  if (graph_->captured) {
    OrtRunOptions* options = nullptr;
    library.check(api.CreateRunOptions(&options), making_a_call);
    own_options_.reset(options);
    static std::atomic<int> numbers{0};  // no two CUDA graphs of the process have one
    library.check(api.AddRunConfigEntry(options, "gpu_graph_id", std::to_string(++numbers).c_str()), making_a_call);
    run_bound(options);  // warms up and captures; outputs are never inputs of the same call, so that nothing is spoilt
  }
}

void OrtCall::run(Interrupt& interrupt) {
  // A captured call is one launch, which cannot be ended.
  run_bound(own_options_ ? own_options_.get() : static_cast<RunInterrupt&>(interrupt).get());
}

void OrtCall::run_bound(OrtRunOptions* options) {
  OrtStatus* status = graph_->library->api().RunWithBinding(graph_->session.get(), options, binding_.get());
  if (status != nullptr) {  // a text is made only then
    graph_->library->check(status, "graph " + graph_->file + " failed in ONNX Runtime");
  }
}

/// Sees that a loaded graph takes and gives what the manifest says.
void check_interface(const Library& library, const OrtSession* session, const GraphSpec& spec) {
  const OrtApi& api = library.api();
  const std::string what = "ONNX Runtime does not tell what " + spec.file + " takes";
  OrtAllocator* allocator = nullptr;
  library.check(api.GetAllocatorWithDefaultOptions(&allocator), what);
  const auto compare = [&](bool input, const std::vector<TensorSpec>& tensors) {
    std::size_t count = 0;
    library.check(input ? api.SessionGetInputCount(session, &count) : api.SessionGetOutputCount(session, &count), what);
    bool same = count == tensors.size();
    for (std::size_t i = 0; i < count && same; ++i) {
      char* name = nullptr;
      library.check(input ? api.SessionGetInputName(session, i, allocator, &name)
                          : api.SessionGetOutputName(session, i, allocator, &name),
                    what);
      const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == name; });
      allocator->Free(allocator, name);
      OrtTypeInfo* info = nullptr;
      library.check(input ? api.SessionGetInputTypeInfo(session, i, &info) : api.SessionGetOutputTypeInfo(session, i, &info),
                    what);
      const OrtTensorTypeAndShapeInfo* form = nullptr;  // info's own
      ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
      OrtStatus* status = api.CastTypeInfoToTensorInfo(info, &form);
      if (status == nullptr && form != nullptr) {
        status = api.GetTensorElementType(form, &type);
      }
      api.ReleaseTypeInfo(info);
      library.check(status, what);
      same = found != tensors.end() && static_cast<std::int32_t>(type) == facts_of(found->dtype).onnx;
    }
    if (!same) {
      throw Error(Code::engine, spec.file + " does not have the " + (input ? "inputs" : "outputs") +
                                    " that its manifest says; export the bundle again");
    }
  };
  compare(true, spec.inputs);
  compare(false, spec.outputs);
}

}  // namespace

OrtEngine::OrtEngine(const std::string& name, const EngineOptions& options)
    : library_(Library::load(options.library)), options_(options), title_(name + " " + library_->version()) {}

std::unique_ptr<Interrupt> OrtEngine::interrupt() const { return std::make_unique<RunInterrupt>(library_); }

std::string read_graph(const Bundle& bundle, const GraphSpec& spec, const Places& places) {
  std::string data = bundle.read(spec.file, most_graph_bytes);
  check_graph(data, spec, bundle.manifest().weights, places);
  return data;
}

Given::Given(const std::shared_ptr<Library>& library, std::shared_ptr<const Instead> instead)
    : library_(library), instead_(std::move(instead)) {
  const OrtApi& api = library_->api();
  const std::string what = "ONNX Runtime does not take a changed weight";
  OrtMemoryInfo* info = nullptr;
  library_->check(api.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &info), what);
  const Handle<OrtMemoryInfo> host(info, Release{library_});
  for (const auto& [name, weight] : *instead_) {
    OrtValue* value = nullptr;
    // It is written to by nobody; the C API has one type for both.
    void* data = const_cast<std::byte*>(weight.data.data());
    library_->check(api.CreateTensorWithDataAsOrtValue(info, data, weight.data.size(), weight.shape.data(),
                                                       weight.shape.size(),
                                                       static_cast<ONNXTensorElementDataType>(facts_of(weight.dtype).onnx),
                                                       &value),
                    what);
    values_.emplace(name, Handle<OrtValue>(value, Release{library_}));
  }
}

void Given::add_to(OrtSessionOptions* options, const std::vector<std::string>& names) const {
  std::vector<const char*> own;
  std::vector<const OrtValue*> values;
  for (const std::string& name : names) {
    if (const auto found = values_.find(name); found != values_.end()) {
      own.push_back(found->first.c_str());
      values.push_back(found->second.get());
    }
  }
  if (!own.empty()) {
    library_->check(library_->api().AddExternalInitializers(options, own.data(), values.data(), own.size()),
                    "ONNX Runtime does not take changed weights");
  }
}

std::shared_ptr<const LoadedGraph> OrtEngine::load_graph(const std::string& folder, const GraphSpec& spec,
                                                         const std::string& data, Handle<OrtSessionOptions> options,
                                                         bool captured, std::shared_ptr<const Given> given) const {
  library_->check(library_->api().AddSessionConfigEntry(
                      options.get(), "session.model_external_initializers_file_folder_path", folder.c_str()),
                  "ONNX Runtime does not take a folder for weights");
  OrtSession* session = nullptr;
  library_->check(library_->api().CreateSessionFromArray(library_->environment(), data.data(), data.size(), options.get(),
                                                         &session),
                  "ONNX Runtime " + library_->version() + " cannot load " + spec.file);
  Handle<OrtSession> handle(session, Release{library_});
  check_interface(*library_, session, spec);
  return std::make_shared<OrtGraph>(library_, spec.file, std::move(handle), memory_info(), captured, std::move(given));
}

}  // namespace tgate::ort

namespace tgate {

std::shared_ptr<const Engine> Engine::open(const EngineOptions& options) {
  if (options.name == "ort-cpu") {
    return ort::open_cpu(options);
  }
  if (options.name == "ort-cuda") {
    return ort::open_cuda(options);
  }
  throw Error(Code::engine, "there is no engine '" + shown(options.name) + "'; use ort-cpu or ort-cuda");
}

}  // namespace tgate

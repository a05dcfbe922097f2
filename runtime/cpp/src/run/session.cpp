#include "run/session.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "contract/error.h"
#include "contract/numbers.h"

namespace tgate {
namespace {

constexpr std::size_t most_tokenizer_bytes = std::size_t{1} << 24;

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) {
    text += (text.empty() ? "" : ", ") + name;
  }
  return text;
}

}  // namespace

// --- a graph outside the loop ----------------------------------------------------------------------------------------

GraphCall::GraphCall(std::shared_ptr<const Engine> engine, const LoadedGraph& graph, const GraphSpec& spec)
    : engine_(std::move(engine)), interrupt_(engine_->interrupt()) {
  std::vector<Bound> inputs, outputs;
  const auto place = [&](const std::vector<TensorSpec>& tensors, std::vector<Slot>& slots, std::vector<Bound>& bounds) {
    for (const TensorSpec& tensor : tensors) {
      slots.push_back({&tensor, engine_->allocate(static_cast<std::size_t>(tensor.bytes(1)))});
      bounds.push_back({&tensor, slots.back().memory->address()});
    }
  };
  place(spec.inputs, inputs_, inputs);
  place(spec.outputs, outputs_, outputs);
  call_ = graph.bind(inputs, outputs, 1);
}

const GraphCall::Slot& GraphCall::slot(const std::vector<Slot>& slots, std::string_view name) const {
  const auto found = std::find_if(slots.begin(), slots.end(), [&](const Slot& each) { return each.tensor->name == name; });
  if (found == slots.end()) {
    throw Error(Code::internal, "a graph has no tensor '" + shown(name) + "'");
  }
  return *found;
}

void GraphCall::write(std::string_view input, const void* data, std::size_t bytes) {
  const Slot& to = slot(inputs_, input);
  if (bytes != static_cast<std::size_t>(to.tensor->bytes(1))) {
    throw Error(Code::internal, "input '" + shown(input) + "' takes " + std::to_string(to.tensor->bytes(1)) + " bytes, got " +
                                    std::to_string(bytes));
  }
  engine_->upload(to.memory->address(), data, bytes);
}

void GraphCall::run() { call_->run(*interrupt_); }

void GraphCall::read(std::string_view output, void* data, std::size_t bytes) const {
  engine_->download(data, slot(outputs_, output).memory->address(), bytes);
}

HostTensors GraphCall::outputs() const {
  HostTensors tensors;
  for (const Slot& from : outputs_) {
    HostTensor tensor{from.tensor->dtype, from.tensor->shape, {}};
    std::replace_if(tensor.shape.begin(), tensor.shape.end(), [](std::int64_t size) { return size < 0; }, 1);
    tensor.data.resize(static_cast<std::size_t>(from.tensor->bytes(1)));
    engine_->download(tensor.data.data(), from.memory->address(), tensor.data.size());
    tensors.emplace(from.tensor->name, std::move(tensor));
  }
  return tensors;
}

/// A call that goes back when it is dropped, but not where it failed.
class Session::Lent {
 public:
  Lent(const Session& session, const GraphSpec& spec) : session_(session), spec_(spec), call_(session.borrow(spec)) {}
  ~Lent() {
    if (call_ != nullptr) {
      session_.give_back(spec_, std::move(call_));
    }
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  GraphCall* operator->() const { return call_.get(); }
  /// Runs it; one that fails is not used again.
  void run() {
    std::unique_ptr<GraphCall> call = std::move(call_);
    call->run();
    call_ = std::move(call);
  }

 private:
  const Session& session_;
  const GraphSpec& spec_;
  std::unique_ptr<GraphCall> call_;
};

std::unique_ptr<GraphCall> Session::borrow(const GraphSpec& spec) const {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    auto& idle = idle_[spec.file];
    if (!idle.empty()) {
      std::unique_ptr<GraphCall> call = std::move(idle.back());
      idle.pop_back();
      return call;
    }
  }
  return std::make_unique<GraphCall>(engine_, graph(spec), spec);
}

void Session::give_back(const GraphSpec& spec, std::unique_ptr<GraphCall> call) const noexcept {
  try {
    const std::lock_guard<std::mutex> lock(guard_);
    idle_[spec.file].push_back(std::move(call));
  } catch (...) {  // no memory for the list: then it is freed
  }
}

// --- sessions --------------------------------------------------------------------------------------------------------

std::shared_ptr<const Session> Session::open(std::shared_ptr<const Bundle> bundle, const SessionOptions& options,
                                             std::shared_ptr<const Engine> engine) {
  const std::shared_ptr<Session> session(new Session);
  const Manifest& manifest = bundle->manifest();
  session->bundle_ = bundle;
  if (manifest.weights.empty()) {
    throw Error(Code::bundle, bundle->path() +
                                  " was exported with --weights none: it can be inspected, not run; export it with weights");
  }
  session->find_plans(options.plans);
  const std::vector<const Plan*>& plans = session->plans_;
  std::set<std::string> used;
  for (const Plan* plan : plans) {
    for (std::string& name : plan->graphs()) {
      used.insert(std::move(name));
    }
  }
  std::vector<const GraphSpec*> graphs;
  for (const std::string& size : options.sizes.empty() ? manifest.sizes() : options.sizes) {
    if (session->shapes_.count(size) > 0) {
      continue;
    }
    session->sizes_.push_back(size);
    session->shapes_[size] = manifest.shapes_of(size);
    for (const Shape* shape : session->shapes_[size]) {
      for (const Plan* plan : plans) {
        plan->check(shape->graphs, manifest.carries);
      }
      std::vector<std::pair<std::string, const GraphSpec*>> kept;
      for (const auto& [name, spec] : shape->graphs) {
        if (spec.role != Role::denoise || used.count(name) > 0) {
          kept.emplace_back(name, &spec);
        }
      }
      check_signatures(manifest, kept);
      check_forms(*shape, kept);
      for (const auto& [name, spec] : kept) {
        const std::string& file = spec->file;
        // Requests here begin from noise alone, and nobody looks at them before they are through.
        if (spec->role == Role::encode || spec->role == Role::preview) continue;
        if (std::none_of(graphs.begin(), graphs.end(), [&](const GraphSpec* each) { return each->file == file; })) {
          graphs.push_back(spec);
        }
      }
    }
    check_ranges(session->shapes_[size], used);
  }
  session->load_tokenizers();
  session->engine_ = engine != nullptr ? std::move(engine) : Engine::open(options.engine);
  session->watch_weights();
  auto loaded = session->engine_->load(*bundle, graphs, nullptr);
  session->advice_ = std::move(loaded.advice);
  std::vector<std::string> names{manifest.weights};
  for (std::size_t i = 0; i < graphs.size(); ++i) {
    session->graphs_.emplace(graphs[i]->file, std::move(loaded.graphs[i]));
    names.push_back(graphs[i]->file);
  }
  // The engine opened the weights by their name: it led to what was checked all the while.
  bundle->check_unchanged(names);
  return session;
}

std::shared_ptr<const Session> Session::adapted(const Scales& scales) const {
  if (scales.empty()) {
    throw Error(Code::argument, "no adapter is named; the session itself has none");
  }
  if (adapted_) {
    throw Error(Code::request, "the session has adapters already; ask the one that it came from");
  }
  check_unchanged();
  const auto instead = std::make_shared<const Instead>(weights_with(*bundle_, scales));
  const std::shared_ptr<Session> made(new Session);
  made->bundle_ = bundle_;
  made->engine_ = engine_;
  made->adapted_ = true;
  made->plan_files_ = plan_files_;
  for (const Plan* plan : plans_) {
    const auto own = std::find_if(plan_files_.begin(), plan_files_.end(), [&](const auto& file) { return &file.second == plan; });
    made->plans_.push_back(own == plan_files_.end() ? plan
                                                    : &made->plan_files_[static_cast<std::size_t>(own - plan_files_.begin())].second);
  }
  made->sizes_ = sizes_;
  made->shapes_ = shapes_;
  made->tokenizers_ = tokenizers_;
  made->graphs_ = graphs_;
  made->watch_weights();
  std::vector<const GraphSpec*> graphs;
  std::vector<std::string> names{manifest().weights};
  std::set<std::string> seen;
  for (const auto& [size, shapes] : shapes_) {
    for (const Shape* shape : shapes) {
      for (const auto& [name, spec] : shape->graphs) {
        if (graphs_.count(spec.file) == 0 || !seen.insert(spec.file).second) continue;
        const std::vector<std::string> read = weights_of(bundle_->read(spec.file, most_graph_bytes)).names;
        const auto is_changed = [&](const std::string& weight) { return instead->find(weight) != instead->end(); };
        if (std::any_of(read.begin(), read.end(), is_changed)) {
          graphs.push_back(&spec);
          names.push_back(spec.file);
        }
      }
    }
  }
  auto loaded = engine_->load(*bundle_, graphs, instead);
  made->advice_ = std::move(loaded.advice);
  for (std::size_t i = 0; i < graphs.size(); ++i) {
    made->graphs_[graphs[i]->file] = std::move(loaded.graphs[i]);
  }
  bundle_->check_unchanged(names);
  return made;
}

void Session::find_plans(const std::vector<std::string>& names) {
  const auto& known = manifest().plans;
  plan_files_.reserve(names.size());  // what is pointed at stays where it is
  for (const std::string& name : names) {
    const bool is_name = std::any_of(known.begin(), known.end(), [&](const auto& each) { return each.first == name; });
    const bool is_file = name.size() > 5 && name.compare(name.size() - 5, 5, ".json") == 0;
    if (is_name || !is_file) {
      plans_.push_back(&manifest().plan(name));
    } else {
      plan_files_.emplace_back(name, Plan::load(name));
      plans_.push_back(&plan_files_.back().second);
      manifest().check_scale(*plans_.back());
    }
  }
  if (plans_.empty()) {
    for (const auto& [name, plan] : known) {
      plans_.push_back(&plan);
    }
  }
}

const Plan& Session::plan(std::string_view name) const {
  for (const auto& [path, plan] : plan_files_) {
    if (path == name) {
      return plan;
    }
  }
  const Plan* found = nullptr;
  for (const Plan* plan : plans_) {
    if (plan->name == name && plan != found) {
      if (found != nullptr) {
        throw Error(Code::request, "the session was opened with two plans called '" + shown(name) + "'; give the file");
      }
      found = plan;
    }
  }
  return found != nullptr ? *found : manifest().plan(name);
}

void Session::load_tokenizers() {
  const GraphSpec* graph = find_role(shapes({}), Role::text);
  if (graph == nullptr) {
    return;
  }
  for (const TokenizerSpec& spec : manifest().tokenizers) {
    const std::string name = bundle_->path() + "/" + spec.file;
    tokenizers_.push_back(std::make_shared<const Tokenizer>(
        Tokenizer::parse(bundle_->read(spec.file, most_tokenizer_bytes), spec.length, spec.pad_id, name)));
    const TensorSpec* input = graph->input(spec.input);
    if (input == nullptr || input->dtype != Dtype::int64 || input->shape != std::vector<std::int64_t>{1, spec.length}) {
      throw Error(Code::bundle, name + " gives " + std::to_string(spec.length) + " tokens as " + shown(spec.input) +
                                    ", which is not what the text graph takes; export the bundle again");
    }
  }
}

void Session::watch_weights() {
  const std::string weights = bundle_->path() + "/" + manifest().weights;
  weights_file_ = ::open(weights.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  struct stat found {};
  if (weights_file_ < 0 || fstat(weights_file_, &found) != 0) {
    throw Error(Code::bundle, weights + " cannot be opened; copy or export the bundle again");
  }
  weights_bytes_ = found.st_size;
  weights_written_ns_ = found.st_mtim.tv_sec * 1000000000LL + found.st_mtim.tv_nsec;
}

Session::~Session() {
  if (weights_file_ >= 0) {
    ::close(weights_file_);
  }
}

const std::vector<const Shape*>& Session::shapes(std::string_view size) const {
  const auto found = size.empty() ? shapes_.find(sizes_.front()) : shapes_.find(size);
  if (found == shapes_.end()) {
    throw Error(Code::request, "size '" + shown(size) + "' is not loaded; there is " + joined(sizes_) + " (the bundle has " +
                                   joined(manifest().sizes()) + "; export it with --size for more)");
  }
  return found->second;
}

const LoadedGraph& Session::graph(const GraphSpec& spec) const {
  const auto found = graphs_.find(spec.file);
  if (found == graphs_.end()) {
    throw Error(Code::engine, "graph " + spec.file + " is not loaded; name its plan in the session's options");
  }
  return *found->second;
}

void Session::check_unchanged() const {
  struct stat found {};
  if (fstat(weights_file_, &found) != 0 || found.st_size != weights_bytes_ ||
      found.st_mtim.tv_sec * 1000000000LL + found.st_mtim.tv_nsec != weights_written_ns_) {
    throw Error(Code::bundle, bundle_->path() + "/" + manifest().weights +
                                  " was changed while it was in use, so nothing that is made of it can be trusted; restore "
                                  "it and open the bundle again");
  }
}

std::vector<Encoding> Session::tokenize(std::string_view prompt) const {
  std::vector<Encoding> encodings;
  for (const auto& tokenizer : tokenizers_) {
    encodings.push_back(tokenizer->encode(prompt));
  }
  return encodings;
}

HostTensors Session::encode_text(const std::vector<std::vector<std::int64_t>>& ids) const {
  const GraphSpec& spec = *find_role(shapes({}), Role::text);
  Lent call(*this, spec);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    call->write(manifest().tokenizers[i].input, ids[i].data(), ids[i].size() * sizeof(std::int64_t));
  }
  call.run();
  HostTensors tensors = call->outputs();
  for (const auto& [name, tensor] : tensors) {
    check_computed(tensor.data.data(), tensor.elements(), tensor.dtype, "the text encoder's " + name + " of this prompt");
  }
  return tensors;
}

HostTensors Session::encode_picture(const Shape& shape, const std::uint8_t* pixels, std::size_t bytes,
                                    std::uint64_t seed) const {
  const GraphSpec& spec = *shape.graph(Role::image);
  const TensorSpec* picture = spec.input("picture");
  if (picture == nullptr || static_cast<std::size_t>(picture->bytes(1)) != bytes) {
    throw Error(Code::request, "the picture must be " + shape.size() + " RGB pixels, " +
                                   std::to_string(picture == nullptr ? 0 : picture->bytes(1)) + " bytes, got " +
                                   std::to_string(bytes));
  }
  Lent call(*this, spec);
  call->write("picture", pixels, bytes);
  if (const TensorSpec* noise = spec.input("noise"); noise != nullptr) {
    std::vector<float> drawn(static_cast<std::size_t>(noise->elements(1)));
    draw_noise(Generator::numpy, seed, conditioning_draw, drawn.data(), drawn.size());
    call->write("noise", drawn.data(), drawn.size() * sizeof(float));
  }
  call.run();
  HostTensors tensors = call->outputs();
  for (const auto& [name, tensor] : tensors) {
    check_computed(tensor.data.data(), tensor.elements(), tensor.dtype, "the image encoder's " + name + " of this picture");
  }
  return tensors;
}

Session::Picture Session::picture(const Shape& shape) const {
  const GraphSpec* decoder = shape.graph(Role::decode);
  const TensorSpec* pixels = decoder == nullptr ? nullptr : decoder->output("image");
  if (pixels == nullptr) {
    throw Error(Code::request, "the bundle has no decoder (--components); export it with one, or take the latents");
  }
  const auto& dims = pixels->shape;
  if (pixels->dtype != Dtype::uint8 || dims.size() < 4 || dims.back() != 3) {
    throw Error(Code::bundle, "the decoder gives no RGB pixels; export the bundle again");
  }
  const std::int64_t height = dims[dims.size() - 3], width = dims[dims.size() - 2];
  return {width, height, pixels->elements(1) / (height * width * 3)};
}

void Session::decode(const Shape& shape, const float* latents, std::uint8_t* pixels, std::size_t bytes) const {
  const std::size_t wanted = picture(shape).bytes(), count = static_cast<std::size_t>(shape.latents_count());
  if (bytes < wanted) {
    throw Error(Code::argument,
                "a picture takes " + std::to_string(wanted) + " bytes, got room for " + std::to_string(bytes));
  }
  check_given(latents, count, Dtype::float32, "the latents");
  Lent call(*this, *shape.graph(Role::decode));
  call->write("latents", latents, count * sizeof(float));
  call.run();
  call->read("image", pixels, wanted);
}

const GraphSpec* find_role(const std::vector<const Shape*>& shapes, Role role) { return shapes.front()->graph(role); }

}  // namespace tgate

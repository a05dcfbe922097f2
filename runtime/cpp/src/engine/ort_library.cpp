#include "engine/ort_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <string_view>

#include "contract/error.h"

namespace tgate::ort {
namespace {

constexpr std::uint32_t api_version = 21;
constexpr int least_minor = 31;  // 1.23 followed external data through "../" and links
constexpr std::size_t most_shown = 500;
const std::string making_an_arena = "ONNX Runtime makes no arena for its sessions";

/// The message on one line, without source positions, and not all of it where it is long: it quotes names of the graph.
std::string first_line(std::string_view message) {
  std::string text, word;
  const auto end_word = [&] {
    const bool position = !word.empty() && word.front() == '/' &&
                          (word.find(".cc:") != std::string::npos || word.find(".h:") != std::string::npos);
    if (!word.empty() && !position) {
      text += text.empty() ? word : " " + word;
    }
    word.clear();
  };
  for (const char letter : message) {
    if (letter == ' ' || letter == '\n' || letter == '\r' || letter == '\t') {
      end_word();
    } else {
      word += letter;
    }
  }
  end_word();
  return shown(text, most_shown);
}

/// Whether a version such as "1.31.1" is at least 1.31.
bool is_new_enough(const std::string& version) {
  char* rest = nullptr;
  const long major = std::strtol(version.c_str(), &rest, 10);
  const long minor = *rest == '.' ? std::strtol(rest + 1, nullptr, 10) : 0;
  return major > 1 || (major == 1 && minor >= least_minor);
}

std::mutex guard;
std::weak_ptr<Library> loaded;

}  // namespace

std::shared_ptr<Library> Library::load(const std::string& path) {
  std::string chosen = path;
  if (chosen.empty()) {
    const char* variable = std::getenv("TGATE_ONNXRUNTIME");  // NOLINT: read once, before threads of ours
    chosen = variable != nullptr && *variable != '\0' ? variable : "libonnxruntime.so.1";
  }
  const std::lock_guard<std::mutex> lock(guard);
  if (auto library = loaded.lock()) {
    if (library->path_ != chosen) {
      throw Error(Code::engine, "this process has loaded ONNX Runtime from " + shown(library->path_, 200) +
                                    ", and sessions use it; got " + shown(chosen, 200) +
                                    ": use one library, or free the sessions of the other");
    }
    return library;
  }
  std::shared_ptr<Library> library(new Library(chosen));
  loaded = library;
  return library;
}

Library::Library(const std::string& path) : path_(path) {
  const std::string remedy =
      "; name the library of ONNX Runtime 1.31 or later as `library` of the session's options, or in "
      "$TGATE_ONNXRUNTIME (the Python wheel holds one: onnxruntime/capi/libonnxruntime.so.1.*)";
  // It stays in the process when the last session is gone: its threads and its statics do not take being unloaded.
  handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle_ == nullptr) {
    const char* reason = dlerror();
    throw Error(Code::engine, "ONNX Runtime cannot be loaded (" + first_line(reason == nullptr ? "" : reason) + ")" + remedy);
  }
  // Its one symbol is versioned by release, so a program that was linked to it dies with the next; asked for by name,
  // it is the one that is there.
  using GetBase = const OrtApiBase* (*)();
  const auto get_base = reinterpret_cast<GetBase>(dlsym(handle_, "OrtGetApiBase"));
  const OrtApiBase* base = get_base == nullptr ? nullptr : get_base();
  if (base == nullptr) {
    throw Error(Code::engine, shown(path, 200) + " is not ONNX Runtime's library" + remedy);
  }
  version_ = base->GetVersionString();
  api_ = is_new_enough(version_) ? base->GetApi(api_version) : nullptr;
  if (api_ == nullptr) {
    throw Error(Code::engine, shown(path, 200) + " is ONNX Runtime " + shown(version_) + remedy);
  }
  // Fatal only: every error is returned as well, and reported once.
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "tgate", &environment_), "ONNX Runtime does not start");
}

Library::~Library() {
  if (environment_ != nullptr) {
    api_->ReleaseEnv(environment_);
  }
}

void Library::check(OrtStatus* status, const std::string& what) const {
  if (status == nullptr) {
    return;
  }
  const std::string message = first_line(api_->GetErrorMessage(status));
  api_->ReleaseStatus(status);
  throw Error(Code::engine, what + ": " + message);
}

void Library::share_arena() {
  const std::lock_guard<std::mutex> lock(guard);
  if (!arena_) {
    OrtMemoryInfo* info = nullptr;
    check(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), making_an_arena);
    register_arena(info, [this](const OrtMemoryInfo* where, const OrtArenaCfg* config) {
      return api_->CreateAndRegisterAllocator(environment_, where, config);
    });
    arena_ = true;
  }
}

void Library::share_arena(int device) {
  const std::lock_guard<std::mutex> lock(guard);
  if (device_arenas_.count(device) == 0) {
    OrtMemoryInfo* info = nullptr;
    check(api_->CreateMemoryInfo("Cuda", OrtArenaAllocator, device, OrtMemTypeDefault, &info), making_an_arena);
    register_arena(info, [&](const OrtMemoryInfo* where, const OrtArenaCfg* config) {
      const std::string number = std::to_string(device);
      const char *key = "device_id", *value = number.c_str();
      return api_->CreateAndRegisterAllocatorV2(environment_, "CUDAExecutionProvider", where, config, &key, &value, 1);
    });
    device_arenas_.insert(device);
  }
}

void Library::register_arena(OrtMemoryInfo* info,
                             const std::function<OrtStatus*(const OrtMemoryInfo*, const OrtArenaCfg*)>& add) const {
  OrtArenaCfg* config = nullptr;
  // Grow by what is asked for (1), not by powers of two; the other values are the engine's own choice.
  const char* keys[] = {"arena_extend_strategy"};
  const std::size_t values[] = {1};
  OrtStatus* status = api_->CreateArenaCfgV2(keys, values, 1, &config);
  if (status == nullptr) {
    status = add(info, config);
  }
  api_->ReleaseMemoryInfo(info);
  if (config != nullptr) {
    api_->ReleaseArenaCfg(config);
  }
  check(status, making_an_arena);
}

}  // namespace tgate::ort

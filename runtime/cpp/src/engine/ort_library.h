// ONNX Runtime's library, loaded by name. Only the engine's own files include this.
#pragma once

#include <onnxruntime_c_api.h>

#include <functional>
#include <memory>
#include <set>
#include <string>

namespace tgate::ort {

/// The library, its functions and its environment: one of a process. What is made with it holds it.
class Library {
 public:
  /// Loads it: at `path`, or if that is empty $TGATE_ONNXRUNTIME, or libonnxruntime.so.1. Throws Error of Code::engine
  /// where it cannot be loaded, is older than 1.31, or another one is loaded in this process and in use.
  static std::shared_ptr<Library> load(const std::string& path);

  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  [[nodiscard]] const OrtApi& api() const noexcept { return *api_; }
  [[nodiscard]] OrtEnv* environment() const noexcept { return environment_; }
  [[nodiscard]] const std::string& version() const noexcept { return version_; }

  /// Throws Error of Code::engine, "`what`: …", where `status` is one, and frees it.
  void check(OrtStatus* status, const std::string& what) const;
  /// One arena that sessions share which ask for it: graphs that run in turn need the memory of the largest alone.
  void share_arena();
  /// The same on a GPU: nothing that is to last may lie in it, since a captured graph writes over it at each replay.
  void share_arena(int device);

 private:
  explicit Library(const std::string& path);
  /// An arena in that memory, which is freed, by the function that adds one to the environment.
  void register_arena(OrtMemoryInfo* info,
                      const std::function<OrtStatus*(const OrtMemoryInfo*, const OrtArenaCfg*)>& add) const;

  std::string path_, version_;
  void* handle_ = nullptr;
  const OrtApi* api_ = nullptr;
  OrtEnv* environment_ = nullptr;
  bool arena_ = false;
  std::set<int> device_arenas_;
};

/// Frees what the C API gave: `Handle<OrtSession>`.
struct Release {
  std::shared_ptr<Library> library;
  void operator()(OrtSession* it) const { library->api().ReleaseSession(it); }
  void operator()(OrtSessionOptions* it) const { library->api().ReleaseSessionOptions(it); }
  void operator()(OrtRunOptions* it) const { library->api().ReleaseRunOptions(it); }
  void operator()(OrtIoBinding* it) const { library->api().ReleaseIoBinding(it); }
  void operator()(OrtValue* it) const { library->api().ReleaseValue(it); }
  void operator()(OrtMemoryInfo* it) const { library->api().ReleaseMemoryInfo(it); }
  void operator()(OrtTypeInfo* it) const { library->api().ReleaseTypeInfo(it); }
  void operator()(OrtArenaCfg* it) const { library->api().ReleaseArenaCfg(it); }
  void operator()(OrtCUDAProviderOptionsV2* it) const { library->api().ReleaseCUDAProviderOptions(it); }
};
template <class T>
using Handle = std::unique_ptr<T, Release>;

}  // namespace tgate::ort

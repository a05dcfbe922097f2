#include "engine/cuda_weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "contract/error.h"

namespace tgate::ort {
namespace {

/// A file's bytes, mapped for as long as this is there.
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat found {};
    if (file < 0 || fstat(file, &found) != 0) {
      if (file >= 0) ::close(file);
      throw Error(Code::bundle, path + " cannot be opened; copy or export the bundle again");
    }
    bytes_ = static_cast<std::size_t>(found.st_size);
    memory_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
    ::close(file);
    if (memory_ == MAP_FAILED) {
      throw Error(Code::memory, path + " cannot be mapped");
    }
  }
  ~Mapped() { munmap(memory_, bytes_); }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  [[nodiscard]] const std::byte* at(const Placed& place) const {
    return static_cast<const std::byte*>(memory_) + place.offset;
  }

 private:
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace

CudaWeights::CudaWeights(const std::shared_ptr<Library>& library, const std::shared_ptr<const CudaRuntime>& cuda,
                         const Bundle& bundle, const Places& places, const LaidWeights& laid, const OrtMemoryInfo* memory) {
  if (laid.empty()) {
    return;
  }
  const Mapped file(bundle.path() + "/" + bundle.manifest().weights);
  std::vector<std::byte> staged;
  for (const auto& [name, each] : laid) {
    const Placed& source = places.at(each.source);
    const Placed made = place_of(each, places);
    const auto bytes = static_cast<std::size_t>(made.length);
    blocks_.push_back(std::make_unique<CudaBlock>(cuda, bytes));
    std::byte* to = blocks_.back()->address();
    const std::byte* from = file.at(source);
    if (!each.order.empty() || each.dtype != source.dtype) {
      staged.resize(bytes);
      lay(each, source, from, staged.data());
      from = staged.data();
    }
    cuda->copy(to, from, bytes);
    cuda->wait();  // what is staged is written to again
    OrtValue* value = nullptr;
    library->check(
        library->api().CreateTensorWithDataAsOrtValue(memory, to, bytes, made.shape.data(), made.shape.size(),
                                                      static_cast<ONNXTensorElementDataType>(facts_of(made.dtype).onnx), &value),
        "ONNX Runtime cannot take weight " + shown(name));
    values_.emplace(name, Handle<OrtValue>(value, Release{library}));
  }
}

}  // namespace tgate::ort

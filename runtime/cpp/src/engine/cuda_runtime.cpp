#include "engine/cuda_runtime.h"

#include <dlfcn.h>

#include <string>

#include "contract/error.h"

namespace tgate::ort {
namespace {

constexpr int any_direction = 4;  // cudaMemcpyDefault
constexpr const char* names[] = {"libcudart.so.13", "libcudart.so.12"};

void* open_library() {
  // What ONNX Runtime's provider has loaded is the right one, whichever else is on the path.
  for (const int flags : {RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL}) {
    for (const char* name : names) {
      if (void* library = dlopen(name, flags)) {
        return library;
      }
    }
  }
  throw Error(Code::engine, "ort-cuda finds no CUDA runtime (libcudart.so.13 or .12); put it on the library path");
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw Error(Code::engine, "the CUDA runtime has no function " + std::string(name));
  }
}

}  // namespace

CudaRuntime::CudaRuntime(int device, void* stream) : device_(device), stream_(stream) {
  void* library = open_library();
  find(library, "cudaSetDevice", set_device_);
  find(library, "cudaMalloc", malloc_);
  find(library, "cudaFree", free_);
  find(library, "cudaMemsetAsync", memset_);
  find(library, "cudaMemcpyAsync", memcpy_);
  find(library, "cudaStreamSynchronize", synchronize_);
  find(library, "cudaGetErrorString", describe_);
  check(set_device_(device_), "finds no such GPU");
}

void CudaRuntime::check(int status, const char* what) const {
  if (status != 0) {
    throw Error(Code::engine, "CUDA " + std::string(what) + ", GPU " + std::to_string(device_) + ": " + shown(describe_(status), 200));
  }
}

std::unique_lock<std::recursive_mutex> CudaRuntime::turn() {
  static std::recursive_mutex mutex;
  return std::unique_lock<std::recursive_mutex>(mutex);
}

void* CudaRuntime::allocate(std::size_t bytes) const {
  const auto held = turn();
  check(set_device_(device_), "cannot use the GPU");
  void* address = nullptr;
  if (malloc_(&address, bytes == 0 ? 1 : bytes) != 0) {
    throw Error(Code::memory, "the GPU has no memory for " + std::to_string(bytes) +
                                  " bytes; ask for fewer images at once, or a smaller size");
  }
  check(memset_(address, 0, bytes, stream_), "cannot clear memory");
  return address;
}

void CudaRuntime::free(void* address) const noexcept {
  const auto held = turn();
  free_(address);
}

void CudaRuntime::copy(void* to, const void* from, std::size_t bytes) const {
  const auto held = turn();
  check(set_device_(device_), "cannot use the GPU");
  check(memcpy_(to, from, bytes, any_direction, stream_), "cannot copy");
}

void CudaRuntime::wait() const {
  const auto held = turn();
  check(synchronize_(stream_), "failed in what came before");
}

}  // namespace tgate::ort

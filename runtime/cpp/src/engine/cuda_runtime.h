// The few functions of the CUDA runtime that ort-cuda uses, of the library that ONNX Runtime has loaded.
#pragma once

#include <cstddef>

namespace tgate::ort {

/// Functions of libcudart, found by name; all copies go through one stream, and `wait` is asked for what has to be done
/// when a call returns. Throws Error of Code::engine where CUDA does.
class CudaRuntime {
 public:
  /// Loads it. `stream`: a cudaStream_t; null is the default one.
  CudaRuntime(int device, void* stream);

  void* allocate(std::size_t bytes) const;  ///< zeros; throws Error of Code::memory where there is not so much
  void free(void* address) const noexcept;
  /// Between host and device, or within the device: the addresses tell.
  void copy(void* to, const void* from, std::size_t bytes) const;
  void wait() const;

 private:
  void check(int status, const char* what) const;

  int device_;
  void* stream_;
  int (*set_device_)(int) = nullptr;
  int (*malloc_)(void**, std::size_t) = nullptr;
  int (*free_)(void*) = nullptr;
  int (*memset_)(void*, int, std::size_t, void*) = nullptr;
  int (*memcpy_)(void*, const void*, std::size_t, int, void*) = nullptr;
  int (*synchronize_)(void*) = nullptr;
  const char* (*describe_)(int) = nullptr;
};

}  // namespace tgate::ort

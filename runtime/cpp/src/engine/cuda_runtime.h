// The few functions of the CUDA runtime that ort-cuda uses, of the library that ONNX Runtime has loaded.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

#include "engine/engine.h"

namespace tgate::ort {

/// Functions of libcudart, found by name; all copies go through one stream, and `wait` is asked for what has to be done
/// when a call returns. Throws Error of Code::engine where CUDA does.
class CudaRuntime {
 public:
  /// Loads it. `stream`: a cudaStream_t; null is the default one.
  CudaRuntime(int device, void* stream);

  /// From cudaMalloc, so outside of every arena of ONNX Runtime's.
  void* allocate(std::size_t bytes) const;  ///< zeros; throws Error of Code::memory where there is not so much
  void free(void* address) const noexcept;
  /// Between host and device, or within the device: the addresses tell.
  void copy(void* to, const void* from, std::size_t bytes) const;
  void wait() const;

  /// Held by whoever asks CUDA for anything, or has ONNX Runtime do so: one thread of the process at a time, however many
  /// sessions there are. What graphs work in is one arena for all of them; and while a call is captured, another thread's
  /// allocation or copy would break the capture.
  [[nodiscard]] static std::unique_lock<std::recursive_mutex> turn();

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

/// Device memory that no graph works in; see DeviceBlock.
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

}  // namespace tgate::ort

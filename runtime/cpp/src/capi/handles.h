// What the C ABI's handles hold, and how errors and structs cross it.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "contract/bundle.h"
#include "contract/error.h"
#include "run/request.h"
#include "tgate.h"

struct tgate_error {
  tgate_code code;
  std::string text;
};

struct tgate_bundle {
  std::shared_ptr<const tgate::Bundle> bundle;
  std::vector<std::string> sizes, adapters;
  std::vector<std::vector<tgate::TensorSpec>> tensors;  // of each size, those that a request may bring
};

struct tgate_session {
  std::shared_ptr<const tgate::Session> session;
};

struct tgate_pool {
  std::shared_ptr<tgate::Pool> pool;
};

struct tgate_request {
  std::unique_ptr<tgate::Request> request;
};

namespace tgate::capi {

/// Puts an error where the caller wants it; where there is no memory for one, one that was made before.
tgate_code report(tgate_error** error, Code code, const char* text) noexcept;

/// Runs `work`; nothing that it throws gets beyond.
template <class Work>
tgate_code guarded(tgate_error** error, Work&& work) noexcept {
  try {
    work();
    return TGATE_OK;
  } catch (const Error& fault) {
    return report(error, fault.code(), fault.what());
  } catch (const std::bad_alloc&) {
    return report(error, Code::memory, "there is no memory left; ask for fewer images at once, or a smaller size");
  } catch (const std::exception& fault) {
    return report(error, Code::internal, fault.what());
  } catch (...) {
    return report(error, Code::internal, "something was thrown that is no exception");
  }
}

/// Throws Error of Code::argument where a pointer that has to be there is not.
template <class T>
T& needed(T* pointer, const char* what) {
  if (pointer == nullptr) {
    throw Error(Code::argument, std::string(what) + " is NULL");
  }
  return *pointer;
}

/// A caller's struct of `size` bytes, filled with defaults.
template <class T>
tgate_code initialise(T* target, std::size_t size, const T& defaults) noexcept {
  if (target == nullptr || size < sizeof(std::size_t) || size > sizeof(T)) {
    return TGATE_ARGUMENT;
  }
  std::memcpy(static_cast<void*>(target), &defaults, size);
  target->size = size;
  return TGATE_OK;
}

/// Sees that a struct is one that its init function has filled.
template <class T>
void check_size(const T& given, const char* what) {
  if (given.size < sizeof(std::size_t) || given.size > sizeof(T)) {
    throw Error(Code::argument, std::string(what) + " has size " + std::to_string(given.size) + ", of at most " +
                                    std::to_string(sizeof(T)) + ": fill it with its init function" +
                                    (given.size > sizeof(T) ? ", and use the library that the program was compiled for" : ""));
  }
}

/// What a caller's struct says, whose last fields it may not have.
template <class T>
T taken(const T* given, const T& defaults, const char* what) {
  T whole = defaults;
  if (given != nullptr) {
    check_size(*given, what);
    std::memcpy(static_cast<void*>(&whole), given, given->size);
  }
  return whole;
}

/// Puts results into a caller's struct, as much of them as it has.
template <class T>
void put(T& target, T result, const char* what) {
  check_size(target, what);
  result.size = target.size;
  std::memcpy(static_cast<void*>(&target), &result, result.size);
}

inline std::string text_or(const char* text, const char* otherwise) { return text == nullptr ? otherwise : text; }
std::vector<std::string> texts(const char* const* names, std::size_t count, const char* what);

}  // namespace tgate::capi

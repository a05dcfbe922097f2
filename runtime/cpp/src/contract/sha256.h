// SHA-256, in hexadecimal digits.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace tgate {

/// The digest of bytes that come in pieces. Throws Error of Code::internal where OpenSSL has no SHA-256.
class Sha256 {
 public:
  Sha256();
  void update(std::string_view bytes);
  /// The digest of all of it, 64 digits. Nothing may be added afterwards.
  std::string hex();

 private:
  struct Free {
    void operator()(void* context) const noexcept;
  };
  std::unique_ptr<void, Free> context_;
};

std::string sha256_of(std::string_view bytes);

}  // namespace tgate

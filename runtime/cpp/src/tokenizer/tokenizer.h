// A prompt's ids, as the `tokenizers` library makes them from a bundle's tokenizer/<i>.json.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tgate {

/// Ids of a prompt, cut and padded to the tokenizer's length, and the part of the prompt, as it was written, that did
/// not fit; empty where all of it did.
struct Encoding {
  std::vector<std::int64_t> ids;
  std::string cut;
};

/// Immutable and thread-safe.
class Tokenizer {
 public:
  /// Reads a tokenizer.json. Throws Error of Code::bundle, one line that begins with `name`, for whatever Python's
  /// `tgate_engine.tokenizer_check` refuses, and for a component that is not known here.
  static Tokenizer parse(std::string_view text, std::int64_t length, std::int64_t pad_id, const std::string& name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Throws Error of Code::request for a prompt that is no UTF-8, longer than 32768 characters, or cannot be tokenized.
  [[nodiscard]] Encoding encode(std::string_view prompt) const;

 private:
  struct Parts;
  explicit Tokenizer(std::unique_ptr<const Parts> parts);
  std::unique_ptr<const Parts> parts_;
};

}  // namespace tgate

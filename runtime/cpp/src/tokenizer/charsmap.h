// SentencePiece's map of characters: a trie of bytes, and the texts that its leaves point at.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tgate {

/// Immutable. Every place that any text can lead to has been visited when it was read.
class Charsmap {
 public:
  /// Reads the bytes of a `precompiled_charsmap`. Throws Error of Code::bundle, which begins with `where`, for one that
  /// leads out of itself, makes more than 64 bytes of a character, or is longer than a megabyte.
  static Charsmap parse(const std::string& bytes, const std::string& where);

  /// What the shortest beginning of a text that the map knows becomes; nothing where it knows none.
  [[nodiscard]] std::optional<std::string_view> find(std::string_view text) const noexcept;

 private:
  std::vector<std::uint32_t> units_;
  std::string texts_;
};

/// The bytes of base64 as Python's `b64decode(…, validate=True)` reads it; nothing where it is none.
std::optional<std::string> from_base64(std::string_view text);

}  // namespace tgate

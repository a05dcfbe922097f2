// Tokens that are found in a prompt before a model sees it: special ones, and names of textual inversions.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/models.h"
#include "tokenizer/normalizers.h"
#include "tokenizer/pre_tokenizers.h"
#include "tokenizer/trie.h"

namespace tgate {

struct AddedToken {
  std::string content;
  bool single_word;  // not where it is part of a word
  bool lstrip;       // with the spaces before it
  bool rstrip;       // with the spaces behind it
  bool normalized;   // found in the normalized text, as what it is normalized to itself
};

/// Immutable.
class AddedTokens {
 public:
  /// Ids are the model's where it has such a token, and follow its last one where it has not, whatever the file says:
  /// so it is in the library. Throws Error of Code::bundle where a normalizer leaves nothing of a token, or makes two
  /// tokens one.
  AddedTokens(std::vector<AddedToken> tokens, const Model& model, const std::vector<Normalizer>& normalizers);

  /// A prompt cut at the tokens in it; what is no token is normalized.
  [[nodiscard]] std::vector<Piece> find(std::string_view prompt, const std::vector<Normalizer>& normalizers) const;

  [[nodiscard]] bool has(std::uint32_t id) const;

 private:
  void cut(const Trie& sought, Aligned text, std::vector<Piece>& pieces) const;

  std::map<std::uint32_t, AddedToken> tokens_;  // by id
  Trie plain_, normalized_;                     // of texts to ids
};

}  // namespace tgate

// How a text is cut into words before a model cuts those into tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "tokenizer/aligned.h"

namespace tgate {

/// A part of a prompt, never empty; with an id where it is an added token, which nothing cuts further.
struct Piece {
  Aligned text;
  std::optional<std::uint32_t> id = std::nullopt;
};

/// Words, and runs of what is neither of a word nor a space.
struct Whitespace {};
/// What spaces part.
struct WhitespaceSplit {};
/// Spaces written as ▁, each the beginning of a piece where `split` says so; one is put before a text without.
struct Metaspace {
  enum class Prepend : std::uint8_t { always, first, never } prepend;
  bool split;
};
/// CLIP's words: runs of letters, single numbers, endings such as 's, runs of other characters; and its two special
/// tokens, written out, where `special` says so.
struct ClipWords {
  bool special;
};
/// Bytes written as printable characters; before that GPT-2's words, where `words` says so.
struct ByteLevel {
  bool add_prefix_space, words;
};

using PreTokenizer = std::variant<Whitespace, WhitespaceSplit, Metaspace, ClipWords, ByteLevel>;

/// Applies them one after the other.
void pre_tokenize(const std::vector<PreTokenizer>& pre_tokenizers, std::vector<Piece>& pieces);

}  // namespace tgate

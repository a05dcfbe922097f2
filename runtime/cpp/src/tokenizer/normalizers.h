// What is done to a text before it is cut into words.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "tokenizer/aligned.h"
#include "tokenizer/charsmap.h"

namespace tgate {

struct Nfc {};
struct Lowercase {};
/// Every run of spaces becomes one.
struct SqueezeSpaces {};
/// What Python's `str.strip` leaves out at both ends is left out.
struct StripEnds {};
/// A text becomes another one, wherever it stands.
struct ReplaceText {
  std::string text, content;
};

using Normalizer = std::variant<Nfc, Lowercase, SqueezeSpaces, StripEnds, ReplaceText, Charsmap>;

/// Applies them one after the other.
void normalize(const std::vector<Normalizer>& normalizers, Aligned& text);

}  // namespace tgate

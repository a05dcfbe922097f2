#include <algorithm>
#include <string>
#include <string_view>

#include "contract/error.h"
#include "tokenizer/read.h"
#include "tokenizer/unicode.h"

namespace tgate {
namespace {

using checks::Place;

// Bounds on what textual inversions cost: how often a prompt is read, times how much longer it may become; and added
// tokens times replacements, which are tried on each of them when the file is loaded.
constexpr double most_replaced = 2e4;
constexpr std::size_t most_named = std::size_t{1} << 22;

/// What Python strips off a text, as export writes it, and as it wrote it: the latter misses two spaces, and is read as
/// the former.
constexpr std::string_view ends =
    R"(\A[\t-\r\x1c-\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+)"
    R"(|(?<![\t-\r\x1c-\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]))"
    R"([\t-\r\x1c-\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+\z)";
constexpr std::string_view ends_before =
    R"(\A[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+)"
    R"(|[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+\z)";

template <class Is>
std::size_t count_of(std::string_view text, const Is& is) {
  std::size_t count = 0;
  for (std::size_t at = 0; at < text.size();) count += is(unicode::next(text, at)) ? 1U : 0U;
  return count;
}

/// Characters that are more than spaces.
std::size_t ink(std::string_view text) { return unicode::count(text) - count_of(text, unicode::is_python_space); }

Normalizer read_replace(const json::Value& value, const Place& place) {
  const auto [_, pattern, content_value] = checks::fields<3>(value, place, {"type", "pattern", "content"});
  const Place here(place, "pattern");
  const auto& [name, sought] = checks::one_field(*pattern, here, {"Regex", "String"});
  const bool regex = name == "Regex";
  const Place of_text(here, name);
  const std::string& text = regex ? checks::any_text(sought, of_text) : checks::text(sought, of_text);
  const std::string& content = checks::any_text(*content_value, Place(place, "content"));
  if (regex && text == R"(\s+)" && content == " ") return SqueezeSpaces{};
  if (regex && (text == ends || text == ends_before) && content.empty()) return StripEnds{};
  // A text for which characters that mean nothing are put in: it holds none of those, and more than spaces, so that
  // what is put in is not replaced again.
  const std::size_t length = unicode::count(content);
  const auto means_nothing = [](char32_t c) { return unicode::is_private(c) || c == ' '; };
  if (regex || !ink(text) || count_of(text, unicode::is_private) || !length || length > checks::most_characters ||
      count_of(content, means_nothing) != length) {
    checks::refuse(place, " replaces " + shown(text) + " by " + shown(content) + ", which export does not write");
  }
  return ReplaceText{text, content};
}

Normalizer read_charsmap(const json::Value& value, const Place& place) {
  const auto [_, map] = checks::fields<2>(value, place, {"type", "precompiled_charsmap"});
  const Place here(place, "precompiled_charsmap");
  const auto bytes = from_base64(checks::any_text(*map, here));
  if (!bytes) checks::refuse(here, " is not base64");
  return Charsmap::parse(*bytes, here.text());
}

Normalizer read_normalizer(const json::Value& value, const Place& place) {
  const std::string& kind = checks::kind(value, place, {"NFC", "Lowercase", "Replace", "Precompiled"});
  if (kind == "Replace") return read_replace(value, place);
  if (kind == "Precompiled") return read_charsmap(value, place);
  checks::fields<1>(value, place, {"type"});
  if (kind == "NFC") return Nfc{};
  return Lowercase{};
}

}  // namespace

std::vector<Normalizer> read_normalizers(const json::Value& value, const Place& place, std::size_t added) {
  std::vector<Normalizer> normalizers;
  if (value.as<std::nullptr_t>()) return normalizers;
  double growth = 1;
  std::size_t names = 0;
  each_component(value, place, "normalizers", checks::most_added, [&](const json::Value& each, const Place& where) {
    normalizers.push_back(read_normalizer(each, where));
    if (const auto* replace = std::get_if<ReplaceText>(&normalizers.back())) {
      ++names;
      const auto length = static_cast<double>(unicode::count(replace->content));
      growth = std::max(growth, length / static_cast<double>(ink(replace->text)));
    }
  });
  if (static_cast<double>(normalizers.size()) * growth > most_replaced || normalizers.size() * added > most_named) {
    throw Error(Code::bundle,
                "it writes out " + std::to_string(names) + " names of textual inversions, up to " +
                    std::to_string(static_cast<int>(growth)) + " times as long, for " + std::to_string(added) +
                    " added tokens: more than can be done for a prompt; use fewer of them, of fewer vectors");
  }
  return normalizers;
}

}  // namespace tgate

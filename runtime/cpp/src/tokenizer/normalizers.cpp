#include "tokenizer/normalizers.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "tokenizer/unicode.h"

namespace tgate {
namespace {

using Part = std::pair<std::size_t, std::size_t>;
constexpr Part none{std::string::npos, std::string::npos};

bool is_ascii(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

/// A text's canonical decomposition, marks in canonical order. As the library has it, a mark keeps what it was to the
/// old text where it is moved.
std::vector<Change> decomposed(const std::string& text) {
  std::vector<Change> changes;
  std::vector<std::pair<std::uint8_t, Change>> marks;
  const auto flush = [&] {
    std::stable_sort(marks.begin(), marks.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& mark : marks) changes.push_back(mark.second);
    marks.clear();
  };
  for (std::size_t at = 0; at < text.size();) {
    int change = 0;
    for (const char32_t part : unicode::decompose(unicode::next(text, at))) {
      if (!part && change) break;
      const std::uint8_t number = unicode::combining_class(part);
      if (!number) flush();
      marks.push_back({number, {part, change}});
      change = 1;
    }
  }
  flush();
  return changes;
}

/// Composes what can be: a starter with what follows it and is not blocked from it.
std::vector<Change> composed(const std::vector<Change>& decomposed) {
  std::vector<Change> changes;
  std::optional<std::size_t> starter;  // where it is in `changes`
  std::uint8_t last = 0;               // the class of the last mark that was left between it and the next character
  for (const Change& next : decomposed) {
    const std::uint8_t number = unicode::combining_class(next.character);
    if (starter && (!last || last < number)) {
      Change& first = changes[*starter];
      if (const char32_t both = unicode::compose(first.character, next.character)) {
        first = {both, first.change + next.change - 1};
        continue;
      }
    }
    if (!number) {
      starter = changes.size();
      last = 0;
    } else if (starter) {
      last = number;
    }
    changes.push_back(next);
  }
  return changes;
}

void apply(const Nfc& /*unused*/, Aligned& text) {
  if (!is_ascii(text.text)) rewrite(text, composed(decomposed(text.text)));
}

void apply(const Lowercase& /*unused*/, Aligned& text) {
  if (is_ascii(text.text)) {
    for (char& c : text.text) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    return;
  }
  std::vector<Change> changes;
  for (std::size_t at = 0; at < text.text.size();) {
    const unicode::Lower lower = unicode::lowercase(unicode::next(text.text, at));
    changes.push_back({lower[0], 0});
    if (lower[1]) changes.push_back({lower[1], 1});
  }
  rewrite(text, changes);
}

void apply(const SqueezeSpaces& /*unused*/, Aligned& text) {
  replace(text, " ", [](std::string_view whole, std::size_t at) -> Part {
    std::size_t begin = std::string::npos, end = at;
    while (at < whole.size()) {
      const std::size_t start = at;
      const bool space = unicode::is_space(unicode::next(whole, at));
      if (space && begin == std::string::npos) begin = start;
      if (space) end = at;
      if (!space && begin != std::string::npos) break;
    }
    return {begin, end};
  });
}

void apply(const StripEnds& /*unused*/, Aligned& text) {
  std::size_t begin = 0, end = 0;  // of what is left
  bool found = false;
  for (std::size_t at = 0; at < text.text.size();) {
    const std::size_t start = at;
    if (unicode::is_python_space(unicode::next(text.text, at))) continue;
    if (!found) begin = start;
    found = true;
    end = at;
  }
  if (begin || end < text.text.size()) text = text.slice(begin, end);
}

void apply(const ReplaceText& change, Aligned& text) {
  replace(text, change.content, [&](std::string_view whole, std::size_t at) -> Part {
    const std::size_t begin = whole.find(change.text, at);
    return begin == std::string::npos ? none : Part{begin, begin + change.text.size()};
  });
}

/// As the library has it: graphemes of up to 5 bytes are looked up as one, and what the map knows of their beginning
/// takes the place of the whole; characters of others, and of those that it does not know, are looked up one by one.
void apply(const Charsmap& map, Aligned& text) {
  std::vector<Change> changes;
  bool changed = false;
  const auto put = [&](std::string_view part) {
    const auto becomes = map.find(part);
    if (!becomes) return false;
    changed = true;
    const auto was = static_cast<int>(unicode::count(part)), is = static_cast<int>(unicode::count(*becomes));
    for (std::size_t at = 0, i = 0; at < becomes->size(); ++i) {
      changes.push_back({unicode::next(*becomes, at), static_cast<int>(i) >= was});
    }
    // What is left out is counted at the character before, if there is one.
    if (is < was && !changes.empty()) changes.back().change += is - was;
    return true;
  };
  std::size_t at = 0;
  for (const std::size_t end : unicode::grapheme_ends(text.text)) {
    const std::string_view grapheme = std::string_view(text.text).substr(at, end - at);
    const bool whole = grapheme.size() < 6 && put(grapheme);
    while (!whole && at < end) {
      const std::size_t start = at;
      const char32_t character = unicode::next(text.text, at);
      if (!put(std::string_view(text.text).substr(start, at - start))) changes.push_back({character, 0});
    }
    at = end;
  }
  if (changed) rewrite(text, changes);
}

}  // namespace

void normalize(const std::vector<Normalizer>& normalizers, Aligned& text) {
  for (const Normalizer& each : normalizers) {
    std::visit([&](const auto& normalizer) { apply(normalizer, text); }, each);
  }
}

}  // namespace tgate

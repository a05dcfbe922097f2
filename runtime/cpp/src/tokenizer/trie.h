// Texts that are looked for at one place of another text, all at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace tgate {

/// A tree of bytes: texts, none of them empty, and a number for each.
class Trie {
 public:
  /// A text that is there already gets the new number.
  void add(std::string_view text, std::uint32_t value) {
    std::uint32_t node = 0;
    for (const char c : text) {
      std::uint32_t& child = slot(node, c);
      if (!child) {
        child = static_cast<std::uint32_t>(values_.size());
        values_.push_back(none);
      }
      node = child;
      if (2 * values_.size() > slots_.size()) grow();
    }
    values_[node] = value;
  }

  /// Calls `found(length, value)` for every text that begins `text`, the shortest first.
  template <class Found>
  void prefixes(std::string_view text, const Found& found) const {
    std::uint32_t node = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      node = child(node, text[i]);
      if (!node) return;
      if (values_[node] != none) found(i + 1, values_[node]);
    }
  }

 private:
  static constexpr std::uint32_t none = 0xffffffff;
  struct Slot {
    std::uint64_t key;    // a node, and a byte below
    std::uint32_t child;  // 0 where the slot is empty: nothing leads to the root
  };

  static std::uint64_t key(std::uint32_t node, char c) {
    return std::uint64_t{node} << 8 | static_cast<unsigned char>(c);
  }

  [[nodiscard]] std::size_t place(std::uint64_t sought) const {
    std::size_t at = static_cast<std::size_t>(sought * 0x9e3779b97f4a7c15U >> 32) & (slots_.size() - 1);
    while (slots_[at].child && slots_[at].key != sought) at = (at + 1) & (slots_.size() - 1);
    return at;
  }

  [[nodiscard]] std::uint32_t child(std::uint32_t node, char c) const { return slots_[place(key(node, c))].child; }

  std::uint32_t& slot(std::uint32_t node, char c) {
    Slot& found = slots_[place(key(node, c))];
    found.key = key(node, c);
    return found.child;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& each : old) {
      if (each.child) slots_[place(each.key)] = each;
    }
  }

  std::vector<std::uint32_t> values_ = {none};  // of nodes; the first is the root
  std::vector<Slot> slots_ = std::vector<Slot>(64);
};

}  // namespace tgate

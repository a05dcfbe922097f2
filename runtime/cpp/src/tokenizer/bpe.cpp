// Byte pair encoding: of the pairs of neighbours that can be merged, the best one is, until there is none.
#include <functional>
#include <queue>

#include "tokenizer/models.h"
#include "tokenizer/unicode.h"

namespace tgate {
namespace {

struct Merge {
  std::uint32_t rank, id;
};

/// What pairs of ids are merged to, in a table of open addresses: a word asks for three pairs each merge.
class Merges {
 public:
  explicit Merges(std::size_t most) {
    std::size_t size = 64;
    while (size < 2 * most) size *= 2;
    slots_.resize(size);
  }

  void set(std::uint32_t first, std::uint32_t second, Merge merge) {
    Slot& slot = slots_[place(key(first, second))];
    slot = {key(first, second), merge};
  }

  [[nodiscard]] const Merge* find(std::uint32_t first, std::uint32_t second) const {
    const Slot& slot = slots_[place(key(first, second))];
    return slot.key == empty ? nullptr : &slot.merge;
  }

 private:
  static constexpr std::uint64_t empty = ~std::uint64_t{0};
  struct Slot {
    std::uint64_t key = empty;
    Merge merge{};
  };

  static std::uint64_t key(std::uint32_t first, std::uint32_t second) { return std::uint64_t{first} << 32 | second; }

  [[nodiscard]] std::size_t place(std::uint64_t sought) const {
    const std::uint64_t mixed = (sought ^ sought >> 29) * 0x9e3779b97f4a7c15U;
    std::size_t at = static_cast<std::size_t>(mixed >> 32) & (slots_.size() - 1);
    while (slots_[at].key != empty && slots_[at].key != sought) at = (at + 1) & (slots_.size() - 1);
    return at;
  }

  std::vector<Slot> slots_;
};

class Bpe : public Model {
 public:
  explicit Bpe(BpeSettings settings) : merges_(settings.merges.size()), settings_(std::move(settings)) {
    std::uint32_t rank = 0;
    for (const auto& [first, second, both] : settings_.merges) merges_.set(first, second, {rank++, both});
    settings_.merges = {};
    if (settings_.unknown) unknown_ = settings_.vocabulary.find(*settings_.unknown);
  }

  void tokenize(std::string_view text, std::vector<Token>& tokens) const override {
    if (const std::uint32_t* id = settings_.ignore_merges ? settings_.vocabulary.find(text) : nullptr) {
      tokens.push_back({*id, 0, text.size(), text});
      return;
    }
    std::vector<Symbol> symbols = characters(text);
    merge(symbols);
    std::size_t at = 0;
    for (const Symbol& symbol : symbols) {
      if (!symbol.length) continue;
      tokens.push_back({symbol.id, at, at + symbol.length, *settings_.vocabulary.name(symbol.id)});
      at += symbol.length;
    }
  }

  [[nodiscard]] std::optional<std::uint32_t> find(std::string_view token) const override {
    const std::uint32_t* id = settings_.vocabulary.find(token);
    return id ? std::optional(*id) : std::nullopt;
  }
  [[nodiscard]] std::size_t size() const override { return settings_.vocabulary.size(); }
  [[nodiscard]] bool has(std::uint32_t id) const override { return settings_.vocabulary.name(id) != nullptr; }

 private:
  static constexpr std::size_t end = ~std::size_t{0};
  struct Symbol {
    std::uint32_t id;
    std::size_t length;  // in bytes; 0 once it is part of the one before
    std::size_t before = end, behind = end;
  };
  struct Candidate {
    std::uint32_t rank;
    std::size_t place;  // of the first of the pair
    std::uint32_t id;
    /// The best rank first; of one rank the leftmost.
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : place > other.place;
    }
  };

  /// A word's characters. One that is no token becomes the unknown one; without such a one it is left out.
  [[nodiscard]] std::vector<Symbol> characters(std::string_view text) const {
    std::vector<Symbol> symbols;
    symbols.reserve(text.size());
    bool fusing = false;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t start = at;
      unicode::next(text, at);
      const std::string_view character = text.substr(start, at - start);
      const bool last = at == text.size() && !settings_.suffix.empty();
      const Vocabulary& vocabulary = settings_.vocabulary;
      const std::uint32_t* id =
          last ? vocabulary.find(std::string(character) + settings_.suffix) : vocabulary.find(character);
      if (id) {
        symbols.push_back({*id, character.size()});
        fusing = false;
      } else if (unknown_ && fusing && settings_.fuse_unknown) {
        symbols.back().length += character.size();
      } else if (unknown_) {
        symbols.push_back({*unknown_, character.size()});
        fusing = true;
      }
    }
    for (std::size_t i = 0; i < symbols.size(); ++i) {
      symbols[i].before = i ? i - 1 : end;
      symbols[i].behind = i + 1 < symbols.size() ? i + 1 : end;
    }
    return symbols;
  }

  /// In n log n steps. A candidate is out of date where its pair is by now merged to something else, or to nothing.
  void merge(std::vector<Symbol>& symbols) const {
    std::vector<Candidate> found;
    found.reserve(symbols.size());
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const Merge* pair = merges_.find(symbols[i].id, symbols[i + 1].id);
      if (pair) found.push_back({pair->rank, i, pair->id});
    }
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>(), std::move(found));
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol& first = symbols[best.place];
      if (!first.length || first.behind == end) continue;
      Symbol& second = symbols[first.behind];
      const Merge* pair = merges_.find(first.id, second.id);
      if (!pair || pair->id != best.id) continue;
      first.id = best.id;
      first.length += second.length;
      first.behind = second.behind;
      second.length = 0;
      if (first.behind != end) symbols[first.behind].before = best.place;
      if (first.before != end) {
        if (const Merge* next = merges_.find(symbols[first.before].id, first.id)) {
          queue.push({next->rank, first.before, next->id});
        }
      }
      if (first.behind != end) {
        if (const Merge* next = merges_.find(first.id, symbols[first.behind].id)) {
          queue.push({next->rank, best.place, next->id});
        }
      }
    }
  }

  Merges merges_;
  BpeSettings settings_;
  const std::uint32_t* unknown_ = nullptr;
};

}  // namespace

std::unique_ptr<const Model> make_bpe(BpeSettings settings) { return std::make_unique<Bpe>(std::move(settings)); }

}  // namespace tgate

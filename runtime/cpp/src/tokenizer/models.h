// The models that cut words into tokens: BPE, Unigram, and a table of words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer/trie.h"

namespace tgate {

/// A token of a text: its id, the bytes that it stands for, and its name, which lives as long as model and text.
struct Token {
  std::uint32_t id;
  std::size_t begin, end;
  std::string_view name;
};

/// Immutable and thread-safe.
class Model {
 public:
  Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  virtual ~Model() = default;

  /// Appends the tokens of a text that is not empty.
  virtual void tokenize(std::string_view text, std::vector<Token>& tokens) const = 0;
  /// The id of a token; nothing where it is none.
  [[nodiscard]] virtual std::optional<std::uint32_t> find(std::string_view token) const = 0;
  /// How many tokens there are.
  [[nodiscard]] virtual std::size_t size() const = 0;
  /// Whether a token has this id.
  [[nodiscard]] virtual bool has(std::uint32_t id) const = 0;
};

/// Tokens and their ids: the file's order, and no token twice.
class Vocabulary {
 public:
  explicit Vocabulary(std::vector<std::pair<std::string, std::uint32_t>> tokens);
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;
  Vocabulary(const Vocabulary&) = delete;
  Vocabulary& operator=(const Vocabulary&) = delete;
  ~Vocabulary() = default;

  [[nodiscard]] const std::uint32_t* find(std::string_view token) const;
  [[nodiscard]] std::size_t size() const { return tokens_.size(); }
  /// The name of the last token with this id; null where there is none.
  [[nodiscard]] const std::string* name(std::uint32_t id) const;

 private:
  std::vector<std::pair<std::string, std::uint32_t>> tokens_;
  std::unordered_map<std::string_view, std::uint32_t> ids_;  // views of `tokens_`
  std::vector<std::uint32_t> places_;                        // by id: 1 + the place in `tokens_`, 0 where there is none
};

/// Ids of a pair of tokens, and of what it is merged to.
struct BpeMerge {
  std::uint32_t first, second, both;
};

struct BpeSettings {
  Vocabulary vocabulary;
  std::vector<BpeMerge> merges;                             // the best first
  std::optional<std::string> unknown;                       // is known
  std::string suffix;                                       // of a word's last character
  bool fuse_unknown, ignore_merges;
};

std::unique_ptr<const Model> make_bpe(BpeSettings settings);

/// Tokens with their scores; ids are their places. A token that is there twice has its last place and score.
std::unique_ptr<const Model> make_unigram(std::vector<std::pair<std::string, double>> scores, std::uint32_t unknown);

/// Whole words; `unknown` is known.
std::unique_ptr<const Model> make_table(Vocabulary vocabulary, std::string unknown);

}  // namespace tgate

// Unigram: of all ways to cut a text into tokens, the one whose scores sum up to the most.
#include <algorithm>
#include <limits>

#include "tokenizer/models.h"
#include "tokenizer/unicode.h"

namespace tgate {
namespace {

constexpr double unknown_penalty = 10.0;

class Unigram : public Model {
 public:
  Unigram(std::vector<std::pair<std::string, double>> scores, std::uint32_t unknown)
      : scores_(std::move(scores)), unknown_(unknown) {
    ids_.reserve(scores_.size());
    double least = std::numeric_limits<double>::infinity();
    for (std::uint32_t id = 0; id < scores_.size(); ++id) {
      const auto& [token, score] = scores_[id];
      ids_[token] = id;
      trie_.add(token, id);
      least = std::min(least, score);
    }
    unknown_score_ = least - unknown_penalty;
  }

  void tokenize(std::string_view text, std::vector<Token>& tokens) const override {
    const std::vector<Node> best = paths(text);
    const std::size_t first = tokens.size();
    // From the end. What is unknown in a row is one token, which the library then looks up by its text.
    for (std::size_t end = text.size(); end > 0;) {
      std::size_t begin = best[end].begin;
      if (best[end].id == unknown_) {
        while (begin > 0 && best[begin].id == unknown_) begin = best[begin].begin;
      }
      const std::string_view piece = text.substr(begin, end - begin);
      tokens.push_back({find(piece).value_or(unknown_), begin, end, piece});
      end = begin;
    }
    std::reverse(tokens.begin() + static_cast<std::ptrdiff_t>(first), tokens.end());
  }

  [[nodiscard]] std::optional<std::uint32_t> find(std::string_view token) const override {
    const auto found = ids_.find(token);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  [[nodiscard]] std::size_t size() const override { return scores_.size(); }
  [[nodiscard]] bool has(std::uint32_t id) const override {
    return id < scores_.size() && find(scores_[id].first) == id;
  }

 private:
  /// The best way to a place: its score, and its last token.
  struct Node {
    double score = 0;
    std::size_t begin = nowhere;
    std::uint32_t id = 0;
  };
  static constexpr std::size_t nowhere = ~std::size_t{0};

  /// By place in bytes; of two ways with one score, the one that was found first.
  [[nodiscard]] std::vector<Node> paths(std::string_view text) const {
    std::vector<Node> best(text.size() + 1);
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t start = at;
      unicode::next(text, at);
      const std::size_t one = at - start;  // the length of a character
      const auto reach = [&](std::size_t length, double score, std::uint32_t id) {
        Node& node = best[start + length];
        const double sum = score + best[start].score;
        if (node.begin == nowhere || sum > node.score) node = {sum, start, id};
      };
      bool known = false;
      trie_.prefixes(text.substr(start), [&](std::size_t length, std::uint32_t id) {
        reach(length, scores_[id].second, id);
        known = known || length == one;
      });
      if (!known) reach(one, unknown_score_, unknown_);
    }
    return best;
  }

  std::vector<std::pair<std::string, double>> scores_;
  std::unordered_map<std::string_view, std::uint32_t> ids_;  // views of `scores_`
  Trie trie_;
  std::uint32_t unknown_;
  double unknown_score_ = 0;
};

}  // namespace

std::unique_ptr<const Model> make_unigram(std::vector<std::pair<std::string, double>> scores, std::uint32_t unknown) {
  return std::make_unique<Unigram>(std::move(scores), unknown);
}

}  // namespace tgate

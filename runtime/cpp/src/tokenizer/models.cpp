#include "tokenizer/models.h"

namespace tgate {

Vocabulary::Vocabulary(std::vector<std::pair<std::string, std::uint32_t>> tokens) : tokens_(std::move(tokens)) {
  ids_.reserve(tokens_.size());
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    const auto& [token, id] = tokens_[i];
    ids_[token] = id;
    if (id >= places_.size()) places_.resize(std::size_t{id} + 1);
    places_[id] = static_cast<std::uint32_t>(i + 1);
  }
}

const std::uint32_t* Vocabulary::find(std::string_view token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? nullptr : &found->second;
}

const std::string* Vocabulary::name(std::uint32_t id) const {
  return id < places_.size() && places_[id] ? &tokens_[places_[id] - 1].first : nullptr;
}

namespace {

class Table : public Model {
 public:
  Table(Vocabulary vocabulary, std::string unknown)
      : vocabulary_(std::move(vocabulary)), unknown_(std::move(unknown)) {}

  void tokenize(std::string_view text, std::vector<Token>& tokens) const override {
    const std::uint32_t* id = vocabulary_.find(text);
    tokens.push_back({id ? *id : *vocabulary_.find(unknown_), 0, text.size(), id ? text : unknown_});
  }

  [[nodiscard]] std::optional<std::uint32_t> find(std::string_view token) const override {
    const std::uint32_t* id = vocabulary_.find(token);
    return id ? std::optional(*id) : std::nullopt;
  }
  [[nodiscard]] std::size_t size() const override { return vocabulary_.size(); }
  [[nodiscard]] bool has(std::uint32_t id) const override { return vocabulary_.name(id) != nullptr; }

 private:
  Vocabulary vocabulary_;
  std::string unknown_;
};

}  // namespace

std::unique_ptr<const Model> make_table(Vocabulary vocabulary, std::string unknown) {
  return std::make_unique<Table>(std::move(vocabulary), std::move(unknown));
}

}  // namespace tgate

// Typed access to JSON that nobody vouches for; every error says where it is, what was got and what was wanted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "contract/error.h"
#include "contract/json.h"

namespace tgate {

inline constexpr std::int64_t largest_whole = std::numeric_limits<std::int64_t>::max();
/// The largest number that float32 holds: everything that is read as a number ends in it.
inline constexpr double largest_number = 3.4028234663852886e38;

/// A word of a table: how JSON spells a value.
template <class T>
struct Spelling {
  std::string_view text;
  T value;
};

/// Reads the members of one object. Borrows the value, which must stay. Every getter throws Error where the member is
/// missing or another thing than is asked for.
class Reader {
 public:
  /// `where`: what messages call the object. `advice`: what they say to do. Throws Error of `code` where it is none.
  Reader(const json::Value& value, std::string where, Code code, std::string_view advice);

  [[nodiscard]] const std::string& where() const { return where_; }
  [[nodiscard]] bool has(std::string_view key) const;
  [[nodiscard]] const json::Value& get(std::string_view key);
  std::string text(std::string_view key);  ///< of at most 4096 characters
  std::string word(std::string_view key);  ///< a name, see `is_word`
  std::string name(std::string_view key);  ///< of a file, see `is_plain_name`
  std::int64_t whole(std::string_view key, std::int64_t least = 0, std::int64_t most = largest_whole);
  double number(std::string_view key, double least = -largest_number, double most = largest_number);
  bool flag(std::string_view key);
  /// Whole numbers from `least` to `most`.
  std::vector<std::int64_t> wholes(std::string_view key, std::int64_t most = largest_whole, std::int64_t least = 1);
  std::vector<double> numbers(std::string_view key) { return numbers_of(get(key), "." + std::string(key)); }
  /// Names, none of them twice.
  std::vector<std::string> words(std::string_view key);
  const json::Array& list(std::string_view key, std::size_t most = std::numeric_limits<std::size_t>::max());
  const json::Object& object(std::string_view key);
  /// An object whose keys are names that the bundle chose.
  const json::Object& named(std::string_view key, std::size_t most = std::numeric_limits<std::size_t>::max());
  /// Sees that an object holds facts: texts, numbers, true, false or null.
  void facts(std::string_view key) { check_facts(get(key), "." + std::string(key)); }
  /// The same of a value that is somewhere inside of the object.
  std::vector<double> numbers_of(const json::Value& value, const std::string& place) const;
  void check_facts(const json::Value& value, const std::string& place) const;
  /// A reader of the object that a key has, to be read by `all_of`.
  Reader inner(std::string_view key);

  template <class T, std::size_t count>
  T choice(std::string_view key, const Spelling<T> (&spellings)[count]) {
    const std::string found = text(key);
    std::string known;
    for (const Spelling<T>& spelling : spellings) {
      if (found == spelling.text) return spelling.value;
      known += (known.empty() ? "" : ", ") + std::string(spelling.text);
    }
    fail("." + std::string(key), "expected one of " + known + ", got '" + shown(found, 60) + "'");
  }

  /// What `build` makes of each object in a list, in its order.
  template <class Build>
  auto items(std::string_view key, Build build, std::size_t most = std::numeric_limits<std::size_t>::max()) {
    std::vector<decltype(build(std::declval<Reader&>()))> built;
    for (const json::Value& value : list(key, most)) {
      const std::string place = where_ + "." + std::string(key) + "[" + std::to_string(built.size()) + "]";
      built.push_back(all_of(Reader(value, place, code_, advice_), build));
    }
    return built;
  }

  /// The same of each object in an object whose keys are names that the bundle chose: pairs, in its order.
  template <class Build>
  auto table(std::string_view key, Build build, std::size_t most = std::numeric_limits<std::size_t>::max()) {
    std::vector<std::pair<std::string, decltype(build(std::declval<Reader&>()))>> built;
    for (const auto& [name, value] : named(key, most)) {
      const std::string place = where_ + "." + std::string(key) + "." + name;
      built.emplace_back(name, all_of(Reader(value, place, code_, advice_), build));
    }
    return built;
  }

  /// What `build` makes of an object. Throws Error where the object holds more than was asked for: what is not
  /// understood is refused.
  template <class Build>
  static auto all_of(Reader reader, Build build) {
    auto built = build(reader);
    reader.refuse_others();
    return built;
  }

  /// Throws Error: the place inside of the object ("" is itself, ".width" a member), and what is wrong there.
  [[noreturn]] void fail(std::string_view place, const std::string& wrong) const;

 private:
  const json::Object* object_{};
  std::string where_;
  Code code_;
  std::string_view advice_;
  std::vector<std::string_view> asked_;

  const json::Value& wanted(std::string_view key, const char* kinds);
  void refuse_others() const;
};

/// Sees that no name is there twice. Throws Error of Code::bundle.
void check_unique(std::vector<std::string_view> names, const std::string& where);

/// `name`, seen to be a plain name inside the bundle. Throws Error of Code::bundle.
const std::string& check_name(const std::string& name);

/// A stranger's value, as a message quotes it.
std::string quoted(const json::Value& value);

}  // namespace tgate

// What becomes of texts: `probe-json parse | words | names | shown`. Each text on stdin is its length in bytes, in decimal,
// a line break, and itself; each answer on stdout is written in the same way.
#include <iostream>
#include <string>

#include "contract/error.h"
#include "contract/json.h"
#include "contract/text.h"

namespace {

/// The canonical form after "=", or why the text is refused after "!".
std::string parsed(const std::string& text) {
  try {
    return "=" + tgate::json::canonical(tgate::json::parse(text));
  } catch (const tgate::json::ParseError& error) {
    return std::string("!") + error.what();
  }
}

std::string answer(const std::string& mode, const std::string& text) {
  if (mode == "words") return tgate::is_word(text) ? "yes" : "no";
  if (mode == "names") return tgate::is_plain_name(text) ? "yes" : "no";
  if (mode == "shown") return tgate::shown(text);
  return parsed(text);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "parse";
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    std::string text(std::stoul(line), '\0');
    std::cin.read(text.data(), static_cast<std::streamsize>(text.size()));
    const std::string told = answer(mode, text);
    std::cout << told.size() << '\n' << told;
  }
}

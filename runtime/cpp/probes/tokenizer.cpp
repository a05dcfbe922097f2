// Shows what a tokenizer makes of prompts: probe-tokenizer FILE LENGTH PAD_ID.
//
// Reads prompts from stdin, each behind its size in bytes (uint32). Writes for each, in the machine's order of bytes:
// 0, the ids (int64 each) and what was cut behind its size; or an error's code (uint32) and its text behind its size.
// A file that is no tokenizer is said so in the first line of stderr, with exit status 2.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "contract/error.h"
#include "tokenizer/tokenizer.h"

namespace {

void put(std::uint32_t number) { std::cout.write(reinterpret_cast<const char*>(&number), sizeof number); }

void put(const std::string& text) {
  put(static_cast<std::uint32_t>(text.size()));
  std::cout.write(text.data(), static_cast<std::streamsize>(text.size()));
}

}  // namespace

int main(int count, char** arguments) {
  std::ios::sync_with_stdio(false);
  if (count != 4) return 1;
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  try {
    const auto tokenizer =
        tgate::Tokenizer::parse(text, std::atoll(arguments[2]), std::atoll(arguments[3]), arguments[1]);
    std::string prompt;
    for (std::uint32_t size = 0; std::cin.read(reinterpret_cast<char*>(&size), sizeof size);) {
      prompt.resize(size);
      std::cin.read(prompt.data(), size);
      try {
        const tgate::Encoding encoding = tokenizer.encode(prompt);
        put(0);
        std::cout.write(reinterpret_cast<const char*>(encoding.ids.data()),
                        static_cast<std::streamsize>(encoding.ids.size() * sizeof(std::int64_t)));
        put(encoding.cut);
      } catch (const tgate::Error& error) {
        put(static_cast<std::uint32_t>(error.code()));
        put(error.what());
      }
    }
  } catch (const tgate::Error& error) {
    std::cerr << error.what() << '\n';
    return 2;
  }
  return 0;
}

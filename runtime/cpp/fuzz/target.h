// What all targets of libFuzzer have in common. Build them with `make cpp-fuzz`; `build/cpp/fuzz/fuzz-graph FOLDER` goes
// on from the files of a folder, and writes there what reaches something new. Sound files to begin with are those of
// tgate_engine/models/mini: the graphs, manifest.json, weights.head, and tokenizer/0.json.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "contract/error.h"

namespace fuzz {

/// A promise of the library that was not kept ends the process.
inline void promise(bool kept) {
  if (!kept) std::abort();
}

/// Whether `act` ends without an Error. One that it throws has to be what a terminal can show; whatever else comes out
/// of it ends the process.
template <class Act>
bool passes(Act act) {
  try {
    act();
    return true;
  } catch (const tgate::Error& error) {
    const std::string_view line = error.what();
    promise(!line.empty() && line.size() < 10000 && tgate::is_utf8(line));
    for (const char letter : line) promise(static_cast<unsigned char>(letter) >= 0x20);
    return false;
  }
}

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace fuzz

// Errors, and texts of strangers made fit to be read in one.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tgate {

/// What failed, by layer. The numbers are those of `tgate_code` in tgate.h.
enum class Code : int {
  argument = 1,   ///< a call of the library that no correct program makes
  bundle = 2,     ///< files are missing, damaged, not to be trusted, or of another version
  plan = 3,       ///< a plan cannot run on its bundle's graphs
  engine = 4,     ///< the engine could not be loaded, or failed
  request = 5,    ///< a request that cannot be served as asked
  memory = 6,     ///< there is not so much memory
  cancelled = 7,  ///< `tgate_request_cancel`, or a callback that said stop
  internal = 8,   ///< a fault of this library
};

/// One clear line: what was got, what was wanted, what to do next.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& text) : std::runtime_error(text), code_(code) {}
  [[nodiscard]] Code code() const noexcept { return code_; }

 private:
  Code code_;
};

/// `text`, which may hold anything, as one line of at most `most` characters without quotation marks: what is no
/// printable character is escaped, what is too long ends in "…". Never throws but for want of memory.
std::string shown(std::string_view text, std::size_t most = 80);

/// Whether `text` is UTF-8 as RFC 3629 has it: no overlong form, no half of a surrogate pair, nothing above U+10FFFF.
bool is_utf8(std::string_view text) noexcept;

}  // namespace tgate

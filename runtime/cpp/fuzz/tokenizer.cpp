// Reads a tokenizer's file, and tokenizes a few texts with it: with letters of one to four bytes, with spaces of all
// kinds, longer than fits, and such as are no text.

#include <string>

#include "target.h"
#include "tokenizer/tokenizer.h"

namespace {

constexpr std::int64_t length = 8;
constexpr std::string_view texts[] = {
    "",
    "a large red circle",
    "  A\tsmall,blue\xc2\xa0square!  42's <s></s>\n",
    "Stra\xc3\x9f" "e e\xcc\x81\xef\xac\x81 \xe4\xb8\xad\xe6\x96\x87 \xf0\x9f\x98\x80\xe2\x80\x8d \xe2\x96\x81x",
    "one two three four five six seven eight nine ten eleven twelve",
    "half a letter \xc3",
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  fuzz::passes([&] {
    const auto tokenizer = tgate::Tokenizer::parse(fuzz::text_of(bytes, size), length, 0, "tokenizer/0.json");
    for (const std::string_view text : texts) {
      fuzz::passes([&] {
        const tgate::Encoding encoding = tokenizer.encode(text);
        fuzz::promise(encoding.ids.size() == static_cast<std::size_t>(length));
        fuzz::promise(text.find(encoding.cut) != std::string_view::npos);
      });
    }
  });
  return 0;
}

// How tests hand many inputs to one probe: records on stdin, each a letter, eight bytes that say how long, lowest
// first, and so many bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace probe {

struct Record {
  char kind{};
  std::string bytes;
};

/// The next record; false at the end of stdin, and where it ends inside of one.
inline bool read_record(Record& record) {
  unsigned char head[9];
  if (std::fread(head, 1, sizeof head, stdin) != sizeof head) return false;
  std::uint64_t size = 0;
  for (int i = 0; i < 8; ++i) size |= std::uint64_t{head[1 + i]} << (8 * i);
  record.kind = static_cast<char>(head[0]);
  record.bytes.resize(size);
  return std::fread(record.bytes.data(), 1, record.bytes.size(), stdin) == record.bytes.size();
}

}  // namespace probe

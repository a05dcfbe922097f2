#include "contract/onnx_wire.h"

#include <cstring>
#include <limits>

namespace tgate::wire {
namespace {

constexpr std::uint32_t varint_type = 0, eight_bytes_type = 1, bytes_type = 2, four_bytes_type = 5;
constexpr const char* unreadable = "is not an ONNX graph";
constexpr const char* unlike_protobuf = "is not written as protobuf writes it";

std::uint32_t wire_type_of(Kind kind) {
  switch (kind) {
    case Kind::int32:
    case Kind::int64: return varint_type;
    case Kind::float32: return four_bytes_type;
    case Kind::bytes:
    case Kind::message: break;
  }
  return bytes_type;
}

std::string unwanted(const Message& message, std::uint32_t number) {
  std::string name = "field " + std::to_string(number);
  for (const Other& other : message.others) {
    if (other.number == number) name = other.name;
  }
  return "has " + name + " in a " + message.name + ", which no bundle has";
}

/// The field of that number; null where the message has none.
const Field* find(const Message& message, std::uint32_t number) {
  for (const Field& field : message.fields) {
    if (field.number == number) return &field;
  }
  return nullptr;
}

}  // namespace

float Entry::number32() const noexcept {
  const auto bits = static_cast<std::uint32_t>(word);
  float value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool Reader::varint(std::uint64_t& value) noexcept {
  if (at_ != end_ && *at_ < 0x80) {
    value = *at_++;
    return true;
  }
  value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    if (at_ == end_) return false;
    const std::uint64_t byte = *at_++;
    value |= (byte & 0x7F) << shift;
    if (byte < 0x80) {
      padded_ = padded_ || byte == 0;
      return shift < 63 || byte <= 1;  // the tenth byte has room for one bit
    }
  }
  return false;
}

bool Reader::next(Entry& entry) noexcept {
  const unsigned char* const start = at_;
  std::uint64_t tag = 0, length = 0;
  if (at_ == end_) return false;
  // Where a field turns out to be none, `at_` goes back to its beginning, which is not the end.
  const auto none = [&] {
    at_ = start;
    return false;
  };
  if (!varint(tag) || tag > std::numeric_limits<std::uint32_t>::max() || tag >> 3 == 0) return none();
  entry.number = static_cast<std::uint32_t>(tag >> 3);
  entry.wire_type = tag & 7;
  switch (entry.wire_type) {
    case varint_type: return varint(entry.word) || none();
    case eight_bytes_type: length = 8; break;
    case four_bytes_type: length = 4; break;
    case bytes_type:
      if (!varint(length)) return none();
      break;
    default: return none();
  }
  if (length > static_cast<std::uint64_t>(end_ - at_)) return none();
  entry.bytes = {reinterpret_cast<const char*>(at_), static_cast<std::size_t>(length)};
  if (entry.wire_type == four_bytes_type) {
    entry.word = at_[0] | std::uint32_t{at_[1]} << 8 | std::uint32_t{at_[2]} << 16 | std::uint32_t{at_[3]} << 24;
  }
  at_ += length;
  return true;
}

std::string oddity(std::string_view data, const Message& message) {
  Reader reader(data);
  Entry entry;
  const Field* last = nullptr;
  while (reader.next(entry)) {
    const Field* const field = last != nullptr && last->number == entry.number ? last : find(message, entry.number);
    const bool packed = field != nullptr && field->several && entry.wire_type == bytes_type;
    if (field == nullptr || (entry.wire_type != wire_type_of(field->kind) && !packed)) {
      return unwanted(message, entry.number);
    }
    if (last != nullptr && (field < last || (field == last && !field->several))) return unlike_protobuf;
    if (entry.wire_type != wire_type_of(field->kind)) return unlike_protobuf;
    if (field->kind == Kind::int32 && entry.whole() != static_cast<std::int32_t>(entry.word)) return unlike_protobuf;
    if (field->kind == Kind::message) {
      // Descriptions hold no message that holds itself, so this goes as deep as they do: seven messages.
      if (std::string inside = oddity(entry.bytes, *field->message); !inside.empty()) return inside;
    }
    last = field;
  }
  if (!reader.at_end()) return unreadable;
  return reader.padded() ? unlike_protobuf : "";
}

}  // namespace tgate::wire

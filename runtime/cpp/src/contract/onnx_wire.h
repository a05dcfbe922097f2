// Protobuf's wire format, as far as graphs use it: a view over the bytes, which takes only what protobuf would write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tgate::wire {

/// How the value of a field lies: as a varint, in four bytes, or as so many bytes.
enum class Kind : std::uint8_t { int32, int64, float32, bytes, message };

struct Message;

/// A field that a message may have; `message` is what is inside one of Kind::message.
struct Field {
  std::uint32_t number;
  Kind kind;
  bool several;
  const Message* message;
};

/// What ONNX has besides, for errors.
struct Other {
  std::uint32_t number;
  const char* name;
};

/// A message's fields by number, upwards, ended by number 0; and others.
struct Message {
  const char* name;
  Field fields[8];
  Other others[12];
};

/// A field as it was read: `word` is its varint or its four bytes, `bytes` what lies inside of any other.
struct Entry {
  std::uint32_t number{};
  std::uint32_t wire_type{};
  std::uint64_t word{};
  std::string_view bytes;

  [[nodiscard]] std::int64_t whole() const noexcept { return static_cast<std::int64_t>(word); }
  [[nodiscard]] float number32() const noexcept;
};

/// The fields of one message, one after the other. Reads nothing outside of it, whatever it holds. A view: the bytes
/// have to stay.
class Reader {
 public:
  explicit Reader(std::string_view message) noexcept
      : at_(reinterpret_cast<const unsigned char*>(message.data())), end_(at_ + message.size()) {}

  /// The next field into `entry`; false at the end, and where what follows is no field.
  bool next(Entry& entry) noexcept;
  /// Whether everything was read: false after `next` gave up.
  [[nodiscard]] bool at_end() const noexcept { return at_ == end_; }
  /// Whether some varint until now was longer than it has to be.
  [[nodiscard]] bool padded() const noexcept { return padded_; }

 private:
  bool varint(std::uint64_t& value) noexcept;

  const unsigned char* at_;
  const unsigned char* end_;
  bool padded_ = false;
};

/// Why `data` is not, byte for byte, what protobuf writes for a message of that description: a predicate such as "has
/// functions in a ModelProto, which no bundle has". Empty where it is. Fields are in the order of their numbers, those
/// that there is one of are there once, numbers take as few bytes as they can and fit their kind, lists are not packed.
std::string oddity(std::string_view data, const Message& message);

}  // namespace tgate::wire

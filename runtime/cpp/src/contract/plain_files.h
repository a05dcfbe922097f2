// Files of strangers: opened once, seen to be plain files, and known again.
//
// A name can lead anywhere by the time it is opened: to a link, a pipe that never ends, a device. So a file is opened
// without following a link and without waiting, and what is asked of it is asked of the open descriptor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tgate {

/// Which file it is and when it was last written to: equal states are the same bytes. `changed_ns` is set by the system
/// at every write, and not by whoever sets `written_ns` back.
struct FileState {
  std::uint64_t device{}, inode{};
  std::int64_t bytes{}, written_ns{}, changed_ns{};
  bool operator==(const FileState& other) const {
    return device == other.device && inode == other.inode && bytes == other.bytes && written_ns == other.written_ns &&
           changed_ns == other.changed_ns;
  }
  bool operator!=(const FileState& other) const { return !(*this == other); }
};

/// Why a file cannot be read, as half a sentence.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// There is nothing of that name.
class NotThere : public FileError {
 public:
  using FileError::FileError;
};

/// A plain file, open for reading. Closed when it goes.
class PlainFile {
 public:
  /// The file that `path` leads to, over links where there are some. Throws FileError.
  static PlainFile open(const std::string& path);
  /// The file `name` below the directory `root`. No part of `name`, parts between slashes, may be a link or "..";
  /// `root` may be a link. Throws FileError.
  static PlainFile open_inside(const std::string& root, const std::string& name);

  PlainFile(PlainFile&& other) noexcept;
  PlainFile& operator=(PlainFile&&) = delete;
  ~PlainFile();

  [[nodiscard]] FileState state() const;
  /// All that is left of it. Throws FileError where that is more than `most_bytes`.
  [[nodiscard]] std::string read(std::size_t most_bytes);
  /// The next bytes: so many, or as many as there are. Throws FileError.
  [[nodiscard]] std::string read_some(std::size_t bytes);
  /// The SHA-256, in hex, of all that is left of it. Throws FileError.
  [[nodiscard]] std::string sha256();

 private:
  explicit PlainFile(int handle);
  int handle_;

  /// Reads up to `bytes`; 0 at the end.
  std::size_t next(char* buffer, std::size_t bytes);
};

}  // namespace tgate

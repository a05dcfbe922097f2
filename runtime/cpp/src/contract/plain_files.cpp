#include "contract/plain_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>
#include <vector>

#include "contract/sha256.h"

namespace tgate {
namespace {

constexpr int reading = O_RDONLY | O_CLOEXEC;
constexpr std::size_t piece = 1u << 20;  // bytes that are hashed at once

[[noreturn]] void fail() {
  const int number = errno;
  const std::string text = std::generic_category().message(number);
  if (number == ENOENT) throw NotThere(text);
  throw FileError(text);
}

/// Opens; a signal does not end it. Throws FileError.
int opened(int folder, const std::string& name, int flags) {
  int handle;
  do {
    handle = ::openat(folder, name.c_str(), flags);
  } while (handle < 0 && errno == EINTR);
  if (handle < 0) fail();
  return handle;
}

/// A directory, open for as long as it is needed.
class Folder {
 public:
  explicit Folder(const std::string& path) : handle_(opened(AT_FDCWD, path, reading | O_DIRECTORY)) {}
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { ::close(handle_); }

  void enter(const std::string& part) {
    const int inner = opened(handle_, part, reading | O_DIRECTORY | O_NOFOLLOW);
    ::close(std::exchange(handle_, inner));
  }
  [[nodiscard]] int handle() const { return handle_; }

 private:
  int handle_;
};

struct stat stat_of(int handle) {
  struct stat found {};
  if (::fstat(handle, &found) != 0) fail();
  return found;
}

std::int64_t nanoseconds(const timespec& time) { return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

}  // namespace

PlainFile::PlainFile(int handle) : handle_(handle) {}

PlainFile::PlainFile(PlainFile&& other) noexcept : handle_(std::exchange(other.handle_, -1)) {}

PlainFile::~PlainFile() {
  if (handle_ >= 0) ::close(handle_);
}

PlainFile PlainFile::open(const std::string& path) {
  PlainFile file(opened(AT_FDCWD, path, reading | O_NONBLOCK));
  if (!S_ISREG(stat_of(file.handle_).st_mode)) throw FileError("it is not a plain file");
  return file;
}

PlainFile PlainFile::open_inside(const std::string& root, const std::string& name) {
  Folder folder(root);
  std::size_t start = 0;
  for (std::size_t slash; (slash = name.find('/', start)) != std::string::npos; start = slash + 1) {
    folder.enter(name.substr(start, slash - start));
  }
  PlainFile file(opened(folder.handle(), name.substr(start), reading | O_NOFOLLOW | O_NONBLOCK));
  if (!S_ISREG(stat_of(file.handle_).st_mode)) throw FileError("it is not a plain file");
  return file;
}

FileState PlainFile::state() const {
  const struct stat found = stat_of(handle_);
  return {static_cast<std::uint64_t>(found.st_dev), static_cast<std::uint64_t>(found.st_ino),
          static_cast<std::int64_t>(found.st_size), nanoseconds(found.st_mtim), nanoseconds(found.st_ctim)};
}

std::size_t PlainFile::next(char* buffer, std::size_t bytes) {
  ssize_t count;
  do {
    count = ::read(handle_, buffer, bytes);
  } while (count < 0 && errno == EINTR);
  if (count < 0) fail();
  return static_cast<std::size_t>(count);
}

std::string PlainFile::read_some(std::size_t bytes) {
  // What the file says of its size saves memory; what is read counts.
  const auto said = static_cast<std::size_t>(std::max<std::int64_t>(state().bytes, 0));
  std::string content(std::min(bytes, said + 1), '\0');
  std::size_t size = 0;
  while (size < bytes) {
    if (size == content.size()) content.resize(std::min(bytes, 2 * size + piece));
    const std::size_t count = next(content.data() + size, content.size() - size);
    if (count == 0) break;
    size += count;
  }
  content.resize(size);
  return content;
}

std::string PlainFile::read(std::size_t most_bytes) {
  const bool fits = state().bytes <= static_cast<std::int64_t>(most_bytes);
  std::string content = fits ? read_some(most_bytes + 1) : "";
  if (!fits || content.size() > most_bytes) {
    throw FileError("it holds more than " + std::to_string(most_bytes) + " bytes");
  }
  return content;
}

std::string PlainFile::sha256() {
  Sha256 digest;
  std::vector<char> buffer(piece);
  while (const std::size_t count = next(buffer.data(), buffer.size())) digest.update({buffer.data(), count});
  return digest.hex();
}

}  // namespace tgate

#include "files.h"

#include <fcntl.h>
#include <png.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "arguments.h"

namespace tool {
namespace {

constexpr std::size_t most_bytes = std::size_t{1} << 32;
constexpr char magic[] = "\x93NUMPY";  // and a version, 1.0

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

[[noreturn]] void refuse(const std::string& path, const std::string& why) { throw Refusal{path + " " + why, 1}; }

std::vector<char> read_whole(const std::string& path) {
  // Without waiting for whoever writes to a pipe.
  const int handle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  const std::unique_ptr<std::FILE, Close> file(handle < 0 ? nullptr : fdopen(handle, "rb"));
  struct stat found {};
  if (file == nullptr || fstat(fileno(file.get()), &found) != 0) {
    refuse(path, std::string("cannot be read (") + std::strerror(errno) + ")");
  }
  if (!S_ISREG(found.st_mode) || static_cast<std::size_t>(found.st_size) > most_bytes) {
    refuse(path, "is no plain file of a size that is read");
  }
  std::vector<char> content(static_cast<std::size_t>(found.st_size));
  content.resize(std::fread(content.data(), 1, content.size(), file.get()));
  return content;
}

/// Writes beside it and renames, so that nobody sees half of it.
void write_whole(const std::string& path, const char* data, std::size_t size) {
  std::string beside = path + ".XXXXXX";
  const int handle = mkstemp(beside.data());
  const std::unique_ptr<std::FILE, Close> file(handle < 0 ? nullptr : fdopen(handle, "wb"));
  bool good = file != nullptr && std::fwrite(data, 1, size, file.get()) == size && std::fflush(file.get()) == 0;
  const mode_t mask = umask(0);
  umask(mask);
  good = good && fchmod(handle, 0666 & ~mask) == 0 && std::rename(beside.c_str(), path.c_str()) == 0;
  if (!good) {
    const std::string reason = std::strerror(errno);
    if (handle >= 0) {
      unlink(beside.c_str());
    }
    refuse(path, "cannot be written (" + reason + ")");
  }
}

}  // namespace

Pixels read_png(const std::string& path) {
  const std::vector<char> content = read_whole(path);
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  if (png_image_begin_read_from_memory(&image, content.data(), content.size()) == 0) {
    refuse(path, std::string("is no PNG picture (") + image.message + ")");
  }
  image.format = PNG_FORMAT_RGB;
  if (std::size_t{image.width} * image.height > (std::size_t{1} << 28)) {
    png_image_free(&image);
    refuse(path, "has more pixels than are read");
  }
  Pixels pixels{static_cast<std::int32_t>(image.width), static_cast<std::int32_t>(image.height), {}};
  pixels.data.resize(PNG_IMAGE_SIZE(image));
  const png_color white{255, 255, 255};
  if (png_image_finish_read(&image, &white, pixels.data.data(), 0, nullptr) == 0) {
    refuse(path, std::string("is a damaged PNG picture (") + image.message + ")");
  }
  return pixels;
}

void write_png(const std::string& path, std::int32_t width, std::int32_t height, const std::uint8_t* pixels) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(width);
  image.height = static_cast<png_uint_32>(height);
  image.format = PNG_FORMAT_RGB;
  png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
  std::vector<char> content(size);
  if (png_image_write_to_memory(&image, content.data(), &size, 0, pixels, 0, nullptr) == 0) {
    refuse(path, std::string("cannot be made a PNG (") + image.message + ")");
  }
  write_whole(path, content.data(), size);
}

Floats read_npy(const std::string& path) {
  const std::vector<char> content = read_whole(path);
  const std::string wanted = "is no NumPy file of float32 in C order, as tgate writes them";
  if (content.size() < 10 || std::memcmp(content.data(), magic, 6) != 0 || content[6] != 1) {
    refuse(path, wanted);
  }
  const auto byte = [&](std::size_t i) { return static_cast<std::size_t>(static_cast<unsigned char>(content[i])); };
  const std::size_t begin = 10 + (byte(8) | (byte(9) << 8));
  if (begin > content.size()) {
    refuse(path, wanted);
  }
  const std::string header(content.data() + 10, begin - 10);
  const std::size_t shape = header.find("'shape': (");
  if (header.find("'descr': '<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos ||
      shape == std::string::npos) {
    refuse(path, wanted);
  }
  Floats array;
  std::size_t elements = 1;
  const char* place = header.c_str() + shape + std::strlen("'shape': (");
  while (*place >= '0' && *place <= '9') {
    char* rest = nullptr;
    const long long size = std::strtoll(place, &rest, 10);
    if (size < 1 || static_cast<std::size_t>(size) > most_bytes / elements) {
      refuse(path, wanted);
    }
    array.shape.push_back(size);
    elements *= static_cast<std::size_t>(size);
    place = rest;
    while (*place == ',' || *place == ' ') {
      ++place;
    }
  }
  if (*place != ')' || content.size() - begin != elements * sizeof(float)) {
    refuse(path, wanted);
  }
  array.data.resize(elements);
  std::memcpy(array.data.data(), content.data() + begin, elements * sizeof(float));
  return array;
}

void write_npy(const std::string& path, const Floats& array) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const std::int64_t size : array.shape) {
    header += std::to_string(size) + ", ";
  }
  header.resize(header.size() - (array.shape.size() > 1 ? 2 : 1));
  header += "), }";
  header.resize((header.size() + 11 + 63) / 64 * 64 - 11, ' ');
  header += '\n';
  std::string content(magic, 6);
  content += {'\x01', '\x00', static_cast<char>(header.size() & 0xFF), static_cast<char>(header.size() >> 8)};
  content += header;
  content.append(reinterpret_cast<const char*>(array.data.data()), array.data.size() * sizeof(float));
  write_whole(path, content.data(), content.size());
}

}  // namespace tool

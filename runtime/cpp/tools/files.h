// Pictures and arrays on disk.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

/// RGB, rows from the top.
struct Pixels {
  std::int32_t width = 0, height = 0;
  std::vector<std::uint8_t> data;
};

/// All of these throw Refusal. What is written replaces the file when it is whole.
Pixels read_png(const std::string& path);
void write_png(const std::string& path, std::int32_t width, std::int32_t height, const std::uint8_t* pixels);

/// A NumPy file of float32 in C order.
struct Floats {
  std::vector<std::int64_t> shape;
  std::vector<float> data;
};
Floats read_npy(const std::string& path);
void write_npy(const std::string& path, const Floats& array);

}  // namespace tool

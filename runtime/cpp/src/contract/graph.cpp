// Graphs as the manifest describes them.
#include <algorithm>
#include <limits>

#include "contract/plan.h"

namespace tgate {
namespace {

constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();

/// The product of two numbers that are not negative, or the largest there is.
std::int64_t product(std::int64_t a, std::int64_t b) { return b != 0 && a > most / b ? most : a * b; }

const TensorSpec* find(const std::vector<TensorSpec>& tensors, std::string_view name) {
  const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

}  // namespace

std::string_view name_of(Role role) {
  constexpr std::string_view names[] = {"denoise", "text", "image", "decode", "encode", "preview"};
  return names[static_cast<std::size_t>(role)];
}

std::int64_t TensorSpec::elements(std::int64_t images) const {
  std::int64_t count = 1;
  for (const std::int64_t dim : shape) count = product(count, dim < 0 ? images : dim);
  return count;
}

std::int64_t TensorSpec::bytes(std::int64_t images) const {
  return product(elements(images), static_cast<std::int64_t>(facts_of(dtype).bytes));
}

bool GraphSpec::operator==(const GraphSpec& other) const {
  return file == other.file && role == other.role && batch == other.batch && inputs == other.inputs &&
         outputs == other.outputs && macs_paper == other.macs_paper && macs_all == other.macs_all &&
         scratch_bytes == other.scratch_bytes;
}

const TensorSpec* GraphSpec::input(std::string_view name) const { return find(inputs, name); }
const TensorSpec* GraphSpec::output(std::string_view name) const { return find(outputs, name); }

const GraphSpec* find(const Graphs& graphs, std::string_view name) {
  const auto found = std::find_if(graphs.begin(), graphs.end(), [&](const auto& graph) { return graph.first == name; });
  return found == graphs.end() ? nullptr : &found->second;
}

}  // namespace tgate

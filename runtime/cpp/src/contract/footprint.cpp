// What a trajectory takes in memory: every buffer that a host allocates before the first step, and the totals.
#include <algorithm>
#include <limits>
#include <unordered_map>
#include <unordered_set>

#include "contract/manifest.h"

namespace tgate {
namespace {

/// Sums and products of bytes: the largest number there is where it is more, as no memory holds that either.
std::int64_t plus(std::int64_t a, std::int64_t b) {
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  return a > most - b ? most : a + b;
}

std::int64_t times(std::int64_t a, std::int64_t b) {
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  return b != 0 && a > most / b ? most : a * b;
}

using Names = std::unordered_set<std::string_view>;

/// The outputs that a step keeps.
Names kept_by(const Step& step) {
  Names names(step.writes.begin(), step.writes.end());
  names.insert({"next_latents", "output"});
  return names;
}

}  // namespace

std::vector<TensorSpec> buffers_of(const Graphs& graphs, const std::vector<const Plan*>& plans) {
  std::vector<TensorSpec> tensors;
  std::unordered_map<std::string_view, std::size_t> places;  // names of graphs, which stay
  const auto put = [&](const TensorSpec& tensor) {
    const auto [place, is_new] = places.emplace(tensor.name, tensors.size());
    if (is_new) {
      tensors.push_back(tensor);
    } else {
      tensors[place->second] = tensor;
    }
  };
  for (const Plan* plan : plans) {
    for (const Step& step : plan->steps) {
      const GraphSpec& graph = *find(graphs, step.graph);
      const Names kept = kept_by(step);
      for (const TensorSpec& tensor : graph.inputs) put(tensor);
      for (const TensorSpec& tensor : graph.outputs) {
        if (kept.count(tensor.name)) put(tensor);
      }
    }
  }
  return tensors;
}

Memory memory_of(const Manifest& manifest, const Shape& shape, const Plan& plan, std::int64_t images) {
  Memory memory;
  if (!manifest.weights.empty()) memory.weights = manifest.files.at(manifest.weights).bytes;
  for (const TensorSpec& tensor : buffers_of(shape.graphs, {&plan})) {
    memory.request = plus(memory.request, tensor.bytes(images));
  }
  // What the graph at work holds besides, outputs that the step does not keep among it.
  for (const Step& step : plan.steps) {
    const GraphSpec& graph = *find(shape.graphs, step.graph);
    const Names kept = kept_by(step);
    std::int64_t scratch = times(images, graph.scratch_bytes);
    for (const TensorSpec& tensor : graph.outputs) {
      if (!kept.count(tensor.name)) scratch = plus(scratch, tensor.bytes(images));
    }
    memory.scratch = std::max(memory.scratch, scratch);
  }
  // Or what the graphs before and after hold, which encode and decode one image at a time, with what they read and give.
  for (const auto& [name, graph] : shape.graphs) {
    if (graph.role == Role::denoise) continue;
    std::int64_t around = times(graph.batch.least, graph.scratch_bytes);
    for (const auto* tensors : {&graph.inputs, &graph.outputs}) {
      for (const TensorSpec& tensor : *tensors) around = plus(around, tensor.bytes(graph.batch.least));
    }
    memory.scratch = std::max(memory.scratch, around);
  }
  memory.peak = plus(memory.weights, plus(memory.request, memory.scratch));
  return memory;
}

}  // namespace tgate

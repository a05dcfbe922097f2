// Checks a graph against what it says of itself: inputs, outputs and weights are those of a manifest and a weight file
// that fit it, so that every rule behind them is reached.

#include <string>
#include <string_view>
#include <vector>

#include "contract/bundle.h"
#include "contract/onnx_messages.h"
#include "target.h"

namespace {

const tgate::DtypeFacts* dtype_of(std::int32_t onnx) {
  for (const tgate::DtypeFacts& facts : tgate::dtypes) {
    if (facts.onnx == onnx) return &facts;
  }
  return nullptr;
}

std::vector<tgate::TensorSpec> said(const tgate::onnx::Names& values) {
  std::vector<tgate::TensorSpec> tensors;
  for (const std::string_view message : values) {
    const tgate::onnx::ValueInfo value = tgate::onnx::read_value(message);
    const tgate::DtypeFacts* const dtype = dtype_of(value.type);
    if (dtype == nullptr) continue;
    tgate::TensorSpec& tensor = tensors.emplace_back();
    tensor.name = value.name;
    tensor.dtype = dtype->dtype;
    for (const auto& dim : value.dims) tensor.shape.push_back(dim.size.value_or(-1));
  }
  return tensors;
}

std::int64_t number_of(std::string_view digits) {
  std::int64_t number = 0;
  for (const char digit : digits.substr(0, 18)) number = 10 * number + (digit - '0') % 10;
  return number;
}

tgate::Places said(const tgate::onnx::Model& model) {
  tgate::Places places;
  for (const std::string_view message : model.initializers) {
    const tgate::onnx::Tensor tensor = tgate::onnx::read_tensor(message);
    const tgate::DtypeFacts* const dtype = dtype_of(tensor.type);
    if (dtype == nullptr) continue;
    tgate::Placed& place = places[std::string(tensor.name)];
    place = {dtype->dtype, tensor.dims, 0, 0};
    for (const auto& [key, value] : tensor.external_data) {
      if (key == "offset") place.offset = number_of(value);
      if (key == "length") place.length = number_of(value);
    }
  }
  return places;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const std::string_view data = fuzz::text_of(bytes, size);
  tgate::GraphSpec spec;
  spec.file = "full.onnx";
  spec.batch = {1, 1};
  const bool written = tgate::onnx::oddity(data).empty();
  // Reading makes no sense of other bytes, but has to stay inside of them.
  const tgate::onnx::Model model = tgate::onnx::read_model(data);
  spec.inputs = said(model.inputs);
  spec.outputs = said(model.outputs);
  const tgate::Places weights = said(model);
  const bool passed = fuzz::passes([&] { tgate::check_graph(data, spec, "weights.safetensors", weights); });
  fuzz::promise(written || !passed);
  // Whatever passes as exported would pass as lowered.
  const bool lowered = fuzz::passes([&] { tgate::check_graph(data, spec, "weights.safetensors", weights, true); });
  fuzz::promise(lowered ? written : !passed);
  return 0;
}

#include "engine/cuda_weights.h"

#include "contract/error.h"
#include "contract/mapped_weights.h"

namespace tgate::ort {
CudaWeights::CudaWeights(const std::shared_ptr<Library>& library, const std::shared_ptr<const CudaRuntime>& cuda,
                         const Bundle& bundle, const Places& places, const LaidWeights& laid, const Instead* instead,
                         const OrtMemoryInfo* memory, CudaUploaded& uploaded) {
  if (laid.empty()) {
    return;
  }
  const MappedWeights file(bundle);
  const Manifest& manifest = bundle.manifest();
  const std::string& digest = manifest.files.at(manifest.weights).sha256;
  std::vector<std::byte> staged;
  for (const auto& [name, each] : laid) {
    const auto changed = instead == nullptr ? Instead::const_iterator{} : instead->find(name);
    const bool own = instead != nullptr && changed != instead->end();
    std::weak_ptr<const CudaWeight>* known = own ? nullptr : &uploaded[{bundle.path() + ":" + digest, name}];
    if (known != nullptr) {
      if (auto there = known->lock()) {
        values_.emplace(name, std::move(there));
        continue;
      }
    }
    const Placed& source = places.at(each.source);
    const Placed made = place_of(each, places);
    const auto bytes = static_cast<std::size_t>(made.length);
    DeviceMemory block = std::make_unique<CudaBlock>(cuda, bytes);
    const std::byte* from = own ? changed->second.data.data() : file.at(source);
    if (!own && (!each.order.empty() || each.dtype != source.dtype)) {
      staged.resize(bytes);
      lay(each, source, from, staged.data());
      from = staged.data();
    }
    cuda->copy(block->address(), from, bytes);
    cuda->wait();  // what is staged is written to again
    OrtValue* value = nullptr;
    library->check(
        library->api().CreateTensorWithDataAsOrtValue(memory, block->address(), bytes, made.shape.data(), made.shape.size(),
                                                      static_cast<ONNXTensorElementDataType>(facts_of(made.dtype).onnx), &value),
        "ONNX Runtime cannot take weight " + shown(name));
    const auto weight = std::make_shared<const CudaWeight>(CudaWeight{std::move(block), {value, Release{library}}});
    if (known != nullptr) *known = weight;
    values_.emplace(name, weight);
  }
}

}  // namespace tgate::ort

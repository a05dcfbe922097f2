// The rules of tgate_engine/onnx_form.py, in its order, so that of two faults both name the same one.

#include <algorithm>
#include <cstddef>
#include <optional>
#include <set>
#include <utility>

#include "contract/bundle.h"
#include "contract/error.h"
#include "contract/json.h"
#include "contract/onnx_messages.h"
#include "contract/onnx_operators.h"
#include "contract/product.h"

namespace tgate {
namespace {

/// Bytes of an element, by its number in TensorProto.DataType.
struct ElementBytes {
  std::int32_t type;
  std::int64_t bytes;
};

/// Which field holds the value of an attribute of a type.
struct ValueField {
  std::int32_t type;
  std::uint32_t field;
};

#include "contract/onnx_form.inc"

using onnx::Attribute, onnx::Dimension, onnx::Model, onnx::Names, onnx::Node, onnx::Opset, onnx::Sizes, onnx::Tensor,
    onnx::ValueInfo;

std::string quoted(std::string_view name, std::size_t most = 60) { return "'" + shown(name, most) + "'"; }

/// A list as far as a line has room for it.
template <class Items, class Write>
std::string listed(const Items& items, Write write) {
  constexpr std::size_t most = 120;
  std::string text = "[";
  for (const auto& item : items) {
    if (text.size() > most) return text + ", …]";
    text += (text.size() > 1 ? ", " : "") + write(item);
  }
  return text + "]";
}

std::string listed(const Sizes& sizes) {
  return listed(sizes, [](std::int64_t size) { return std::to_string(size); });
}

std::string listed(const Names& names) {
  return listed(names, [](std::string_view name) { return quoted(name, 20); });
}

/// A decimal of one to 19 digits, none of them a leading zero.
std::optional<std::uint64_t> number_of(std::string_view text) {
  if (text.empty() || text.size() > 19 || (text.front() == '0' && text.size() > 1)) return std::nullopt;
  std::uint64_t number = 0;
  for (const char digit : text) {
    if (digit < '0' || digit > '9') return std::nullopt;
    number = 10 * number + static_cast<std::uint64_t>(digit - '0');
  }
  return number;
}

std::string text_of(const onnx::Value& value) {
  switch (value.type) {
    case 1: return json::repr(static_cast<double>(value.number));
    case 2: return std::to_string(value.whole);
    case 3: return "b" + quoted(value.text);
    case 7: return listed(value.several);
    default: return "numbers";
  }
}

/// One file's rules, each a method that throws.
class Check {
 public:
  Check(const GraphSpec& spec, const std::string& weights_file, const Places& weights, bool lowered)
      : spec_(spec), weights_file_(weights_file), weights_(weights), lowered_(lowered) {}

  void model(std::string_view data);

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    if (lowered_) throw Error(Code::bundle, spec_.file + ", lowered, " + what + "; run tgate build again");
    throw Error(Code::bundle, spec_.file + " " + what + "; export the bundle again");
  }
  void text(std::string_view text) const {
    if (!is_utf8(text)) refuse("holds a text that is no UTF-8");
  }
  void make(std::string_view name);
  void graph(const Model& model);
  void node(const Node& node);
  void attribute(const onnx::Operator& known, const Attribute& attribute, const Names& seen) const;
  void tensor(const Tensor& tensor) const;
  void external_tensor(const Tensor& tensor, std::int64_t length) const;
  void interface(const std::string& what, const Names& values, const std::vector<TensorSpec>& tensors) const;
  [[nodiscard]] bool fits(const Dimension& dim, std::int64_t size) const;

  const GraphSpec& spec_;
  const std::string& weights_file_;
  const Places& weights_;
  const bool lowered_;
  std::set<std::string_view> made_;  // sorted: whoever chooses names cannot make it slow, as he could a hash table
};

void Check::model(std::string_view data) {
  if (data.size() > most_bytes) {
    refuse("holds " + std::to_string(data.size()) + " bytes, of at most " + std::to_string(most_bytes));
  }
  if (const std::string odd = onnx::oddity(data); !odd.empty()) refuse(odd);
  const Model model = onnx::read_model(data);
  if (model.ir_version < least_ir_version || model.ir_version > most_ir_version) {
    refuse("has IR version " + std::to_string(model.ir_version) + ", of " + std::to_string(least_ir_version) + " to " +
           std::to_string(most_ir_version));
  }
  const auto& opsets = model.opsets;
  const bool contrib = lowered_ && opsets.size() == 2 && onnx::is_contrib(opsets[1].domain, opsets[1].version);
  if ((opsets.size() != 1 && !contrib) || !opsets[0].domain.empty() || opsets[0].version < least_opset ||
      opsets[0].version > most_opset) {
    const std::string imports = listed(opsets, [](const Opset& opset) {
      return "(" + quoted(opset.domain, 20) + ", " + std::to_string(opset.version) + ")";
    });
    refuse("imports operators " + imports + "; the default ones of " + std::to_string(least_opset) + " to " +
           std::to_string(most_opset) + " are known");
  }
  text(model.producer_name);
  text(model.producer_version);
  graph(model);
}

void Check::graph(const Model& model) {
  if (model.nodes.size() > most_nodes) {
    refuse("has " + std::to_string(model.nodes.size()) + " nodes, of at most " + std::to_string(most_nodes));
  }
  interface("input", model.inputs, spec_.inputs);
  interface("output", model.outputs, spec_.outputs);
  text(model.name);
  for (const std::string_view message : model.values) {
    const ValueInfo value = onnx::read_value(message);
    text(value.name);
    for (const Dimension& dim : value.dims) text(dim.name.value_or(""));
  }
  for (const std::string_view value : model.inputs) make(onnx::name_of_value(value));
  for (const std::string_view message : model.initializers) {
    const Tensor one = onnx::read_tensor(message);
    make(one.name);
    tensor(one);
  }
  Node one;
  for (const std::string_view message : model.nodes) {
    onnx::read_node(message, one);
    node(one);
  }
  for (const std::string_view value : model.outputs) {
    const std::string_view name = onnx::name_of_value(value);
    if (made_.count(name) == 0) refuse("makes no output " + quoted(name));
  }
}

void Check::make(std::string_view name) {
  text(name);
  if (name.empty()) refuse("makes a value without a name");
  if (!made_.insert(name).second) refuse("makes the value " + quoted(name) + " twice");
}

void Check::node(const Node& node) {
  text(node.name);
  const onnx::Operator* const known = onnx::find_operator(node.domain, node.operator_name, lowered_);
  if (known == nullptr) {
    const std::string domain = node.domain.empty() ? "" : shown(node.domain, 60) + ".";
    refuse("has operator " + domain + quoted(node.operator_name) + ", which no bundle has");
  }
  const auto has = [&] { return "has operator " + std::string(known->name); };
  if (!onnx::takes(*known, node.inputs, node.outputs)) {
    refuse(has() + " of inputs " + listed(node.inputs) + " and outputs " + listed(node.outputs) +
           ", which no bundle has");
  }
  for (const std::string_view name : node.inputs) {
    if (!name.empty() && made_.count(name) == 0) {
      refuse(has() + " that reads " + quoted(name) + ", which nothing before it makes");
    }
  }
  for (const std::string_view name : node.outputs) {
    if (!name.empty()) make(name);
  }
  Names seen;
  for (const std::string_view message : node.attributes) {
    const Attribute one = onnx::read_attribute(message);
    attribute(*known, one, seen);
    seen.push_back(one.name);
  }
}

/// `seen`: the names of the attributes before it, of which there are no more than the operator has.
void Check::attribute(const onnx::Operator& known, const Attribute& attribute, const Names& seen) const {
  const auto has = [&] {
    return "has operator " + std::string(known.name) + " with attribute " + quoted(attribute.name);
  };
  std::optional<std::uint32_t> field;
  for (const ValueField& one : value_fields) {
    if (one.type == attribute.value.type) field = one.field;
  }
  if (!field) refuse(has() + " of type " + std::to_string(attribute.value.type));
  const bool others = std::any_of(attribute.fields.begin(), attribute.fields.end(),
                                  [&](std::uint32_t one) { return one != *field; });
  if (others || std::find(seen.begin(), seen.end(), attribute.name) != seen.end()) refuse(has() + " of two values");
  if (!onnx::may_say(known, attribute.name, attribute.value)) {
    refuse(has() + " of " + text_of(attribute.value) + ", which no bundle has");
  }
}

void Check::tensor(const Tensor& tensor) const {
  const auto has = [&] { return "has constant " + quoted(tensor.name); };
  const auto* const element = std::find_if(std::begin(element_bytes), std::end(element_bytes),
                                           [&](const ElementBytes& one) { return one.type == tensor.type; });
  const bool negative = std::any_of(tensor.dims.begin(), tensor.dims.end(), [](std::int64_t dim) { return dim < 0; });
  if (element == std::end(element_bytes) || tensor.dims.size() > most_dimensions || negative) {
    refuse(has() + " of type " + std::to_string(tensor.type) + " and shape " + listed(tensor.dims));
  }
  const std::int64_t length = product(tensor.dims, element->bytes);
  if (tensor.location == external) {
    external_tensor(tensor, length);
  } else if (tensor.location != 0 || !tensor.external_data.empty()) {
    refuse(has() + " in no known place");
  } else if (const std::string_view raw = tensor.raw.value_or(""); static_cast<std::int64_t>(raw.size()) != length) {
    refuse(has() + " of " + std::to_string(raw.size()) + " bytes, where its shape takes " +
           (length < 0 ? "more than there are" : std::to_string(length)));
  }
}

/// It is a tensor of the weight file, by name, dtype, shape and place.
void Check::external_tensor(const Tensor& tensor, std::int64_t length) const {
  const auto has = [&] { return "has weight " + quoted(tensor.name); };
  const auto said = [&] {
    return listed(tensor.external_data, [](const auto& one) {
      return "(" + quoted(one.first, 20) + ", " + quoted(one.second, 40) + ")";
    });
  };
  const auto place = [&](std::string_view key) {
    const std::string_view* found = nullptr;
    for (const auto& one : tensor.external_data) {
      if (one.first == key) found = &one.second;
    }
    return found;
  };
  const std::string_view* const location = place("location");
  const std::string_view* const offset_text = place("offset");
  const std::string_view* const length_text = place("length");
  if (tensor.external_data.size() != 3 || location == nullptr || offset_text == nullptr || length_text == nullptr ||
      tensor.raw) {
    refuse(has() + " with " + said() + "; a location, an offset and a length are wanted");
  }
  if (*location != weights_file_ || weights_file_.empty()) {
    refuse(has() + " in " + quoted(*location) + "; weights lie in " + quoted(weights_file_) + " alone");
  }
  for (const std::string_view* one : {offset_text, length_text}) text(*one);
  const std::optional<std::uint64_t> at = number_of(*offset_text), bytes = number_of(*length_text);
  if (!at || !bytes) refuse(has() + " with " + said() + ", which are no numbers of bytes");
  const auto found = weights_.find(tensor.name);
  if (found == weights_.end()) refuse(has() + ", which " + weights_file_ + " does not hold");
  const Placed& own = found->second;
  const DtypeFacts& dtype = facts_of(own.dtype);
  if (tensor.type != dtype.onnx || tensor.dims != own.shape || *at != static_cast<std::uint64_t>(own.offset) ||
      *bytes != static_cast<std::uint64_t>(own.length) || own.length != length) {
    refuse(has() + " of type " + std::to_string(tensor.type) + ", shape " + listed(tensor.dims) + ", at " +
           std::to_string(*at) + " with " + std::to_string(*bytes) + " bytes; " + weights_file_ + " has " +
           std::string(dtype.name) + " " + listed(own.shape) + " at " + std::to_string(own.offset) + " with " +
           std::to_string(own.length));
  }
}

/// The file's inputs or outputs are the manifest's, in any order.
void Check::interface(const std::string& what, const Names& values, const std::vector<TensorSpec>& tensors) const {
  std::map<std::string_view, const TensorSpec*> specs;
  for (const TensorSpec& tensor : tensors) specs[tensor.name] = &tensor;
  if (values.size() > specs.size()) {
    refuse("has " + std::to_string(values.size()) + " " + what + "s, its manifest says " +
           std::to_string(specs.size()));
  }
  std::set<std::string_view> names, odd;
  for (const std::string_view value : values) names.insert(onnx::name_of_value(value));
  for (const std::string_view name : names) {
    if (specs.count(name) == 0) odd.insert(name);
  }
  for (const auto& [name, spec] : specs) {
    if (names.count(name) == 0) odd.insert(name);
  }
  if (!odd.empty()) {
    const std::string list = listed(odd, [](std::string_view name) { return quoted(name); });
    refuse("does not have the " + what + "s its manifest says: " + list.substr(1, list.size() - 2));
  }
  for (const std::string_view message : values) {
    const ValueInfo value = onnx::read_value(message);
    const TensorSpec& spec = *specs.at(value.name);
    bool fit = value.type == facts_of(spec.dtype).onnx && value.dims.size() == spec.shape.size();
    for (std::size_t i = 0; fit && i < spec.shape.size(); ++i) fit = fits(value.dims[i], spec.shape[i]);
    if (fit) continue;
    const std::string dims = listed(value.dims, [](const Dimension& dim) {
      return dim.name.value_or("").empty() ? std::to_string(dim.size.value_or(0)) : quoted(*dim.name, 20);
    });
    const std::string wanted = listed(spec.shape, [](std::int64_t size) {
      return size < 0 ? std::string("'batch'") : std::to_string(size);
    });
    refuse("has " + what + " " + shown(spec.name) + " of type " + std::to_string(value.type) + " and shape " + dims +
           "; its manifest says " + std::string(facts_of(spec.dtype).name) + " " + wanted);
  }
}

/// A fixed dimension is that size; the batch has a name, or is the one size that it can have.
bool Check::fits(const Dimension& dim, std::int64_t size) const {
  if (dim.size && dim.name) return false;
  const std::int64_t fixed = dim.size.value_or(0);
  if (size >= 0) return fixed == size;
  const std::string_view name = dim.name.value_or("");
  return (!name.empty() && is_utf8(name)) || (spec_.batch.least == spec_.batch.most && spec_.batch.most == fixed);
}

}  // namespace

void check_graph(std::string_view data, const GraphSpec& spec, const std::string& weights_file, const Places& weights,
                 bool lowered) {
  Check(spec, weights_file, weights, lowered).model(data);
}

GraphWeights weights_of(std::string_view data) {
  const Model model = onnx::read_model(data);
  GraphWeights found;
  for (const std::string_view message : model.initializers) {
    const Tensor one = onnx::read_tensor(message);
    if (one.location != external) continue;
    found.names.emplace_back(one.name);
    found.bfloat |= one.type == facts_of(Dtype::bfloat16).onnx;
    found.half |= one.type == facts_of(Dtype::bfloat16).onnx || one.type == facts_of(Dtype::float16).onnx;
  }
  Node one;
  for (const std::string_view message : model.nodes) {
    onnx::read_node(message, one);
    found.resizes |= one.operator_name == "Resize";
  }
  return found;
}

}  // namespace tgate

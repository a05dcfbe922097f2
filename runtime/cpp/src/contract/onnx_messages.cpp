#include "contract/onnx_messages.h"

#include "contract/onnx_wire.h"

namespace tgate::onnx {
namespace {

#include "contract/onnx_messages.inc"

template <class Take>
void each_field(std::string_view message, Take take) {
  wire::Reader reader(message);
  for (wire::Entry entry; reader.next(entry);) take(entry);
}

std::int32_t int32_of(const wire::Entry& entry) { return static_cast<std::int32_t>(entry.whole()); }

/// What lies in the field of that number; empty where it is not there.
std::string_view inside(std::string_view message, std::uint32_t number) {
  std::string_view found;
  each_field(message, [&](const wire::Entry& entry) {
    if (entry.number == number) found = entry.bytes;
  });
  return found;
}

Dimension read_dimension(std::string_view message) {
  Dimension dim;
  each_field(message, [&](const wire::Entry& entry) {
    if (entry.number == dimension_proto::dim_value) dim.size = entry.whole();
    if (entry.number == dimension_proto::dim_param) dim.name = entry.bytes;
  });
  return dim;
}

Opset read_opset(std::string_view message) {
  Opset opset;
  each_field(message, [&](const wire::Entry& entry) {
    if (entry.number == operator_set_id_proto::domain) opset.domain = entry.bytes;
    if (entry.number == operator_set_id_proto::version) opset.version = entry.whole();
  });
  return opset;
}

void read_graph(std::string_view message, Model& model) {
  each_field(message, [&](const wire::Entry& entry) {
    switch (entry.number) {
      case graph_proto::node: model.nodes.push_back(entry.bytes); break;
      case graph_proto::name: model.name = entry.bytes; break;
      case graph_proto::initializer: model.initializers.push_back(entry.bytes); break;
      case graph_proto::input: model.inputs.push_back(entry.bytes); break;
      case graph_proto::output: model.outputs.push_back(entry.bytes); break;
      case graph_proto::value_info: model.values.push_back(entry.bytes); break;
      default: break;
    }
  });
}

}  // namespace

std::string oddity(std::string_view data) { return wire::oddity(data, model_proto::message); }

std::string_view name_of_value(std::string_view message) { return inside(message, value_info_proto::name); }

ValueInfo read_value(std::string_view message) {
  ValueInfo value;
  value.name = name_of_value(message);
  const std::string_view type = inside(inside(message, value_info_proto::type), type_proto::tensor_type);
  each_field(type, [&](const wire::Entry& entry) {
    if (entry.number == tensor_type_proto::elem_type) value.type = int32_of(entry);
    if (entry.number != tensor_type_proto::shape) return;
    each_field(entry.bytes, [&](const wire::Entry& dim) { value.dims.push_back(read_dimension(dim.bytes)); });
  });
  return value;
}

Tensor read_tensor(std::string_view message) {
  Tensor tensor;
  each_field(message, [&](const wire::Entry& entry) {
    switch (entry.number) {
      case tensor_proto::dims: tensor.dims.push_back(entry.whole()); break;
      case tensor_proto::data_type: tensor.type = int32_of(entry); break;
      case tensor_proto::name: tensor.name = entry.bytes; break;
      case tensor_proto::raw_data: tensor.raw = entry.bytes; break;
      case tensor_proto::external_data:
        tensor.external_data.emplace_back(inside(entry.bytes, string_string_entry_proto::key),
                                          inside(entry.bytes, string_string_entry_proto::value));
        break;
      case tensor_proto::data_location: tensor.location = int32_of(entry); break;
      default: break;
    }
  });
  return tensor;
}

Attribute read_attribute(std::string_view message) {
  Attribute attribute;
  each_field(message, [&](const wire::Entry& entry) {
    switch (entry.number) {
      case attribute_proto::name: attribute.name = entry.bytes; return;
      case attribute_proto::type: attribute.value.type = int32_of(entry); return;
      case attribute_proto::f: attribute.value.number = entry.number32(); break;
      case attribute_proto::i: attribute.value.whole = entry.whole(); break;
      case attribute_proto::s: attribute.value.text = entry.bytes; break;
      case attribute_proto::ints: attribute.value.several.push_back(entry.whole()); break;
      default: break;
    }
    if (attribute.fields.empty() || attribute.fields.back() != entry.number) attribute.fields.push_back(entry.number);
  });
  return attribute;
}

void read_node(std::string_view message, Node& node) {
  node.name = node.operator_name = node.domain = {};
  for (Names* names : {&node.inputs, &node.outputs, &node.attributes}) names->clear();
  each_field(message, [&](const wire::Entry& entry) {
    switch (entry.number) {
      case node_proto::input: node.inputs.push_back(entry.bytes); break;
      case node_proto::output: node.outputs.push_back(entry.bytes); break;
      case node_proto::name: node.name = entry.bytes; break;
      case node_proto::op_type: node.operator_name = entry.bytes; break;
      case node_proto::attribute: node.attributes.push_back(entry.bytes); break;
      case node_proto::domain: node.domain = entry.bytes; break;
      default: break;
    }
  });
}

Model read_model(std::string_view data) {
  Model model;
  each_field(data, [&](const wire::Entry& entry) {
    switch (entry.number) {
      case model_proto::ir_version: model.ir_version = entry.whole(); break;
      case model_proto::producer_name: model.producer_name = entry.bytes; break;
      case model_proto::producer_version: model.producer_version = entry.bytes; break;
      case model_proto::graph: read_graph(entry.bytes, model); break;
      case model_proto::opset_import: model.opsets.push_back(read_opset(entry.bytes)); break;
      default: break;
    }
  });
  return model;
}

}  // namespace tgate::onnx

// The messages that a graph is made of, as views: protobuf's own classes are not needed for reading them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "contract/onnx_operators.h"

namespace tgate::onnx {

using Names = std::vector<std::string_view>;
using Sizes = std::vector<std::int64_t>;

struct Dimension {
  std::optional<std::int64_t> size;
  std::optional<std::string_view> name;
};

/// A ValueInfoProto.
struct ValueInfo {
  std::string_view name;
  std::int32_t type{};
  std::vector<Dimension> dims;
};

/// A TensorProto.
struct Tensor {
  std::string_view name;
  Sizes dims;
  std::int32_t type{}, location{};
  std::optional<std::string_view> raw;
  std::vector<std::pair<std::string_view, std::string_view>> external_data;
};

/// An AttributeProto; `fields` are those of its value that are there.
struct Attribute {
  std::string_view name;
  Value value;
  std::vector<std::uint32_t> fields;
};

/// A NodeProto; attributes as they lie there.
struct Node {
  std::string_view name, operator_name, domain;
  Names inputs, outputs, attributes;
};

/// An OperatorSetIdProto.
struct Opset {
  std::string_view domain;
  std::int64_t version{};
};

/// A ModelProto and its GraphProto, whose parts are as they lie there.
struct Model {
  std::int64_t ir_version{};
  std::string_view producer_name, producer_version;
  std::vector<Opset> opsets;
  std::string_view name;
  Names nodes, initializers, inputs, outputs, values;
};

/// Why `data` is no model of the known messages, as protobuf writes it, see wire::oddity; empty where it is one. What
/// follows reads messages of such data: it never reads outside of them, but of others it makes no sense.
std::string oddity(std::string_view data);

Model read_model(std::string_view data);
/// Into `node`, whose room is used again.
void read_node(std::string_view message, Node& node);
Attribute read_attribute(std::string_view message);
Tensor read_tensor(std::string_view message);
/// The name of a ValueInfoProto, and all of it.
std::string_view name_of_value(std::string_view message);
ValueInfo read_value(std::string_view message);

}  // namespace tgate::onnx

// Checks graphs: an S record is a spec as JSON, {"file", "batch": [least, most], "inputs": [[name, dtype, [sizes]]],
// "outputs", "weights_file", "weights": {name: [dtype, [sizes], offset, length]}, "lowered"}, -1 standing for the batch. A G
// record is a graph, checked against the last spec: a line says "ok", or why not. A T record is one too: the line says
// how many nanoseconds a check took, the least of twenty.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <string>
#include <string_view>

#include "contract/bundle.h"
#include "contract/error.h"
#include "contract/json.h"
#include "records.h"

namespace {

using tgate::json::Array;
using tgate::json::Value;

struct Given {
  tgate::GraphSpec spec;
  std::string weights_file;
  tgate::Places weights;
  bool lowered{};
};

template <class T>
const T& held(const Value& value) {
  return std::get<T>(value.held);
}

const Value& member(const Value& value, std::string_view key) { return *value.find(key); }

tgate::Dtype dtype_of(const Value& name) {
  for (const tgate::DtypeFacts& facts : tgate::dtypes) {
    if (facts.name == held<std::string>(name)) return facts.dtype;
  }
  throw tgate::Error(tgate::Code::argument, "no dtype");
}

std::vector<std::int64_t> sizes_of(const Value& value) {
  std::vector<std::int64_t> sizes;
  for (const Value& size : held<Array>(value)) sizes.push_back(held<std::int64_t>(size));
  return sizes;
}

std::vector<tgate::TensorSpec> tensors_of(const Value& value) {
  std::vector<tgate::TensorSpec> tensors;
  for (const Value& each : held<Array>(value)) {
    const auto& [name, dtype, sizes] = std::tie(held<Array>(each)[0], held<Array>(each)[1], held<Array>(each)[2]);
    tensors.push_back({held<std::string>(name), dtype_of(dtype), sizes_of(sizes)});
  }
  return tensors;
}

Given given_by(std::string_view text) {
  const Value value = tgate::json::parse(text);
  Given given;
  given.spec.file = held<std::string>(member(value, "file"));
  const auto batch = sizes_of(member(value, "batch"));
  given.spec.batch = {batch.at(0), batch.at(1)};
  given.spec.inputs = tensors_of(member(value, "inputs"));
  given.spec.outputs = tensors_of(member(value, "outputs"));
  given.weights_file = held<std::string>(member(value, "weights_file"));
  given.lowered = held<bool>(member(value, "lowered"));
  for (const auto& [name, each] : held<tgate::json::Object>(member(value, "weights"))) {
    const auto& place = held<Array>(each);
    given.weights[name] = {dtype_of(place.at(0)), sizes_of(place.at(1)), held<std::int64_t>(place.at(2)),
                           held<std::int64_t>(place.at(3))};
  }
  return given;
}

std::string verdict(const std::string& data, const Given& given) {
  try {
    tgate::check_graph(data, given.spec, given.weights_file, given.weights, given.lowered);
  } catch (const tgate::Error& error) {
    return error.what();
  }
  return "ok";
}

std::int64_t least_ns(const std::string& data, const Given& given) {
  std::int64_t least = INT64_MAX;
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    verdict(data, given);
    least = std::min<std::int64_t>(least, (std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1));
  }
  return least;
}

}  // namespace

int main() {
  Given given;
  probe::Record record;
  while (probe::read_record(record)) {
    if (record.kind == 'S') given = given_by(record.bytes);
    if (record.kind == 'G') std::cout << verdict(record.bytes, given) << '\n';
    if (record.kind == 'T') std::cout << least_ns(record.bytes, given) << '\n';
  }
}

#include "arguments.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <map>

namespace tool {

const char* const help =
    R"(usage: tgate-run BUNDLE (--prompt TEXT | --token-ids IDS | --image X.png) [--output X.png] [options]

Draw with a bundle, without Python.

  --prompt TEXT             what to draw
  --negative-prompt TEXT    what to keep away from
  --token-ids 1,2,3         in place of a prompt; once for each tokenizer
  --negative-token-ids IDS  likewise
  --image X.png             of a model that a picture conditions: RGB, of the size
  --seed N                  0 by default; image j has the seed N + j
  --generator NAME          what draws the noise: numpy (default) or torch-cuda
  --plan NAME               "default" by default
  --size WxH                one of the bundle's
  --guidance-scale G        the plan's by default
  --lora NAME[:SCALE]       an adapter of the bundle's, and what it is multiplied with (1 by default); may be repeated
  --num-images N            1 by default
  --initial-latents X.npy   standard normal noise in place of the seed's
  --save-latents Y.npy      the final latents, before decoding
  --output X.png            several pictures are X-0.png, X-1.png, …; a video's, X-0-000.png, X-0-001.png, …
  --engine NAME             ort-cpu (default) or ort-cuda
  --threads N               of a graph, on a CPU
  --device N                the GPU's number, 0 by default
  --cuda-graphs             ort-cuda: steps are replayed as CUDA graphs
  --memory MODE             fast or shared, by default the engine's choice
  --library FILE            ONNX Runtime's; $TGATE_ONNXRUNTIME or libonnxruntime.so.1 by default
  --quiet                   nothing but errors
  --version, --help
)";

namespace {

std::int64_t whole(const std::string& option, const std::string& text, std::int64_t least, std::int64_t most) {
  errno = 0;
  char* rest = nullptr;
  const long long number = std::strtoll(text.c_str(), &rest, 10);
  const bool odd = text.empty() || *rest != '\0' || text.front() == ' ' || text.front() == '+' || errno != 0;
  if (odd || number < least || number > most) {
    throw Refusal{option + " takes a whole number from " + std::to_string(least) + " to " + std::to_string(most) + ", got '" +
                      text.substr(0, 60) + "'",
                  2};
  }
  return number;
}

std::vector<std::int64_t> numbers(const std::string& option, const std::string& text) {
  std::vector<std::int64_t> ids;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    ids.push_back(whole(option, text.substr(begin, end - begin), 0, INT64_MAX));
    begin = end + 1;
  }
  return ids;
}

void add_lora(const std::string& option, const std::string& text, std::map<std::string, double>& loras) {
  const std::size_t colon = text.rfind(':');
  const std::string name = text.substr(0, colon), number = colon == std::string::npos ? "1" : text.substr(colon + 1);
  char* rest = nullptr;
  const double scale = std::strtod(number.c_str(), &rest);
  const bool odd = number.empty() || *rest != '\0' || number.find_first_of("xX ") != std::string::npos;
  if (name.empty() || odd || !std::isfinite(scale)) {
    throw Refusal{option + " takes an adapter's name, or NAME:SCALE, got '" + text.substr(0, 80) + "'", 2};
  }
  if (!loras.emplace(name, scale).second) {
    throw Refusal{option + " names '" + name.substr(0, 80) + "' twice", 2};
  }
}

}  // namespace

Arguments parse(int count, char** words) {
  Arguments asked;
  const auto text = [](std::string& target) { return [&target](const std::string&, const std::string& value) { target = value; }; };
  const std::map<std::string, std::function<void(const std::string&, const std::string&)>> options = {
      {"--prompt", [&](auto&, auto& value) { asked.prompt = value, asked.has_prompt = true; }},
      {"--negative-prompt", [&](auto&, auto& value) { asked.negative_prompt = value, asked.has_negative_prompt = true; }},
      {"--token-ids", [&](auto& name, auto& value) { asked.token_ids.push_back(numbers(name, value)); }},
      {"--negative-token-ids", [&](auto& name, auto& value) { asked.negative_token_ids.push_back(numbers(name, value)); }},
      {"--image", text(asked.image)},
      {"--seed", [&](auto& name, auto& value) { asked.seed = static_cast<std::uint64_t>(whole(name, value, 0, INT64_MAX)); }},
      {"--generator", text(asked.generator)},
      {"--plan", text(asked.plan)},
      {"--size", text(asked.size)},
      {"--guidance-scale",
       [&](auto& name, auto& value) {
         char* rest = nullptr;
         asked.guidance_scale = std::strtod(value.c_str(), &rest);
         // 0 is the plan's to the library; whoever writes it here means something else. And 0x3 is no decimal number.
         const bool odd = value.empty() || *rest != '\0' || value.find_first_of("xX ") != std::string::npos;
         if (odd || !std::isfinite(asked.guidance_scale) || asked.guidance_scale == 0) {
           throw Refusal{name + " takes a number other than 0, got '" + value.substr(0, 60) + "'; leave it out for the plan's", 2};
         }
       }},
      {"--lora", [&](auto& name, auto& value) { add_lora(name, value, asked.loras); }},
      {"--num-images", [&](auto& name, auto& value) { asked.images = static_cast<std::size_t>(whole(name, value, 1, 65536)); }},
      {"--initial-latents", text(asked.initial_latents)},
      {"--save-latents", text(asked.save_latents)},
      {"--output", text(asked.output)},
      {"--engine", text(asked.engine)},
      {"--threads", [&](auto& name, auto& value) { asked.threads = static_cast<int>(whole(name, value, 1, 4096)); }},
      {"--device", [&](auto& name, auto& value) { asked.device = static_cast<int>(whole(name, value, 0, 255)); }},
      {"--memory", text(asked.memory)},
      {"--library", text(asked.library)},
  };
  const std::map<std::string, bool*> flags = {
      {"--cuda-graphs", &asked.cuda_graphs}, {"--quiet", &asked.quiet}, {"--help", &asked.help}, {"--version", &asked.version}};
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (const auto flag = flags.find(word); flag != flags.end()) {
      *flag->second = true;
      continue;
    }
    if (word.rfind("--", 0) != 0) {
      if (!asked.bundle.empty()) {
        throw Refusal{"one bundle is wanted, got '" + asked.bundle + "' and '" + word + "'; a prompt goes with --prompt", 2};
      }
      asked.bundle = word;
      continue;
    }
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const auto found = options.find(name);
    if (found == options.end()) {
      throw Refusal{"there is no option " + name.substr(0, 60) + "; see --help", 2};
    }
    if (equals == std::string::npos && ++i == count) {
      throw Refusal{name + " takes a value", 2};
    }
    found->second(name, equals == std::string::npos ? std::string(words[i]) : word.substr(equals + 1));
  }
  if (asked.help || asked.version) {
    return asked;
  }
  const int ways = (asked.has_prompt ? 1 : 0) + (asked.token_ids.empty() ? 0 : 1) + (asked.image.empty() ? 0 : 1);
  if (asked.bundle.empty() || ways != 1) {
    throw Refusal{"a bundle, and one of --prompt, --token-ids and --image are wanted; see --help", 2};
  }
  if (asked.output.empty() && asked.save_latents.empty()) {
    throw Refusal{"nothing would be kept: give --output X.png, or --save-latents Y.npy", 2};
  }
  const auto ends = [](const std::string& name, const std::string& with) {
    return name.size() > with.size() && name.compare(name.size() - with.size(), with.size(), with) == 0;
  };
  if (!asked.output.empty() && !ends(asked.output, ".png")) {
    throw Refusal{"--output ends in .png here, got '" + asked.output + "'; `tgate generate` writes other formats", 2};
  }
  return asked;
}

}  // namespace tool

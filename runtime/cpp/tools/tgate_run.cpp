// tgate-run: draw with a bundle, without Python. It uses nothing but the public headers of libtgate.
#include <sys/stat.h>

#include <cstdio>
#include <cstring>
#include <tgate.hpp>

#include "arguments.h"
#include "files.h"

namespace {

std::string numbered(const std::string& output, const std::string& number) {
  return output.substr(0, output.size() - std::strlen(".png")) + "-" + number + ".png";
}

void check_folder(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  struct stat found {};
  if (stat(folder.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
    throw tool::Refusal{path + ": there is no folder " + folder, 2};
  }
}

std::string shown(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) {
    text += (text.empty() ? "[" : ", ") + std::to_string(size);
  }
  return text + "]";
}

void save(const tool::Arguments& asked, const tgate::Request& request) {
  for (std::size_t i = 0; !asked.output.empty() && i < asked.images; ++i) {
    const tgate::Picture picture = request.decode(i);
    const std::size_t each = picture.pixels.size() / static_cast<std::size_t>(picture.frames);
    for (std::int32_t frame = 0; frame < picture.frames; ++frame) {
      std::string name = asked.output;
      if (picture.frames > 1) {
        const std::string number = std::to_string(frame);
        name = numbered(name, std::to_string(i) + "-" + std::string(number.size() < 3 ? 3 - number.size() : 0, '0') + number);
      } else if (asked.images > 1) {
        name = numbered(name, std::to_string(i));
      }
      tool::write_png(name, picture.width, picture.height, picture.pixels.data() + static_cast<std::size_t>(frame) * each);
    }
  }
}

int run(const tool::Arguments& asked) {
  for (const std::string& path : {asked.output, asked.save_latents}) {
    if (!path.empty()) {
      check_folder(path);
    }
  }
  const tgate::Bundle bundle(asked.bundle);
  if (!asked.output.empty() && bundle.facts().decodes == 0) {
    throw tool::Refusal{asked.bundle + " has no decoder (--components), so there is no picture; give --save-latents Y.npy", 1};
  }
  tgate::SessionOptions loading;
  loading.engine = asked.engine;
  loading.library = asked.library;
  loading.memory = asked.memory;
  loading.threads = asked.threads;
  loading.device = asked.device;
  loading.cuda_graphs = asked.cuda_graphs;
  loading.plans = {asked.plan.empty() ? "default" : asked.plan};
  loading.sizes = asked.size.empty() ? std::vector<std::string>{bundle.sizes().front()} : std::vector<std::string>{asked.size};
  tool::Floats latents;
  tool::Pixels picture;
  if (!asked.initial_latents.empty()) {
    latents = tool::read_npy(asked.initial_latents);
  }
  if (!asked.image.empty()) {
    picture = tool::read_png(asked.image);
    const std::string size = std::to_string(picture.width) + "x" + std::to_string(picture.height);
    if (size != loading.sizes.front()) {
      throw tool::Refusal{asked.image + " has " + size + " pixels, and " + loading.sizes.front() + " are wanted; resize it first", 1};
    }
  }
  tgate::Session session(bundle, loading);
  if (!asked.loras.empty()) {
    session = session.adapted(asked.loras);
  }
  if (const std::string advice = session.advice(); !advice.empty() && !asked.quiet) {
    std::fprintf(stderr, "tgate-run: %s\n", advice.c_str());
  }

  std::vector<tgate_ids> ids, negative_ids;
  for (const auto& each : asked.token_ids) {
    ids.push_back({each.data(), each.size()});
  }
  for (const auto& each : asked.negative_token_ids) {
    negative_ids.push_back({each.data(), each.size()});
  }
  if (!negative_ids.empty() && negative_ids.size() != ids.size()) {
    throw tool::Refusal{"--negative-token-ids is given " + std::to_string(negative_ids.size()) + " times, --token-ids " +
                            std::to_string(ids.size()) + " times; once for each tokenizer is wanted",
                        2};
  }
  tgate_request_options ask;
  tgate_request_options_init(&ask, sizeof ask);
  ask.plan = loading.plans.front().c_str();
  ask.images = asked.images;
  ask.seed = asked.seed;
  ask.generator = asked.generator.c_str();
  ask.guidance_scale = asked.guidance_scale;
  ask.prompt = asked.has_prompt ? asked.prompt.c_str() : nullptr;
  ask.negative_prompt = asked.has_negative_prompt ? asked.negative_prompt.c_str() : nullptr;
  ask.ids = ids.empty() ? nullptr : ids.data();
  ask.negative_ids = negative_ids.empty() ? nullptr : negative_ids.data();
  ask.id_count = ids.size();
  ask.picture = picture.data.empty() ? nullptr : picture.data.data();
  ask.picture_bytes = picture.data.size();
  ask.initial_latents = latents.data.empty() ? nullptr : latents.data.data();
  ask.initial_latents_count = latents.data.size();
  if (!asked.quiet) {
    ask.on_step = [](tgate_request*, const tgate_progress* progress, void*) {
      std::fprintf(stderr, "\r%zu of %zu%s", progress->done, progress->total, progress->done == progress->total ? "\n" : "");
      return std::int32_t{0};
    };
  }
  tgate::Request request(session, ask);
  std::int64_t shape[8];
  std::vector<std::int64_t> dims(shape, shape + tgate_request_latents_shape(request.get(), shape));
  dims.insert(dims.begin(), static_cast<std::int64_t>(asked.images));
  if (!latents.data.empty() && latents.shape != dims) {
    throw tool::Refusal{asked.initial_latents + " has the shape " + shown(latents.shape) + ", and " + shown(dims) + " is wanted", 1};
  }
  if (!request.cut().empty()) {
    std::fprintf(stderr, "tgate-run: warning: the prompt is longer than the model takes; left out: \"%.500s\"\n",
                 request.cut().c_str());
  }
  request.run();
  if (!asked.save_latents.empty()) {
    tool::Floats kept;
    kept.shape = dims;
    for (std::size_t i = 0; i < asked.images; ++i) {
      const std::vector<float> each = request.latents(i);
      kept.data.insert(kept.data.end(), each.begin(), each.end());
    }
    tool::write_npy(asked.save_latents, kept);
  }
  save(asked, request);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    const tool::Arguments asked = tool::parse(count, words);
    if (asked.help || asked.version) {
      const bool told = asked.help ? std::fputs(tool::help, stdout) >= 0 : std::printf("tgate-run %s\n", tgate_version()) >= 0;
      if (!told || std::fflush(stdout) != 0) {
        std::fputs("tgate-run: standard output cannot be written\n", stderr);
        return 1;
      }
      return 0;
    }
    return run(asked);
  } catch (const tool::Refusal& refusal) {
    std::fprintf(stderr, "tgate-run: %s\n", refusal.text.c_str());
    return refusal.exit_code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tgate-run: %s\n", error.what());
    return 1;
  }
}

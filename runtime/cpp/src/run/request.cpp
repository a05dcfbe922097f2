#include "run/request.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "contract/error.h"
#include "contract/numbers.h"

namespace tgate {
namespace {

constexpr double most_scale = 1e6;
constexpr std::uint64_t seed_limit = std::uint64_t{1} << 63;

[[noreturn]] void refuse(const std::string& text) { throw Error(Code::request, text); }

/// Rows of numbers that the shape holds, as tensors.
HostTensor constant(const std::vector<float>& row) {
  HostTensor tensor{Dtype::float32, {1, static_cast<std::int64_t>(row.size())}, {}};
  tensor.data.resize(row.size() * sizeof(float));
  std::memcpy(tensor.data.data(), row.data(), tensor.data.size());
  return tensor;
}

HostTensor zeros_like(const HostTensor& tensor) {
  return {tensor.dtype, tensor.shape, std::vector<std::byte>(tensor.data.size())};
}

/// The tensors of both halves, made of what an encoder gave: `<name>.<half>` to its numbers. `negative` null stands for
/// zeros in place of a text. As `tgate_engine.conditioning.halves`.
std::map<std::string, HostTensor, std::less<>> halves(const Manifest& manifest, const Shape& shape,
                                                      const HostTensors& positive, const HostTensors* negative) {
  std::map<std::string, HostTensor, std::less<>> rows;
  for (const Conditioning& tensor : manifest.conditioning) {
    const bool is_constant = tensor.source == Source::constant;
    const auto found = positive.find(tensor.name);
    if (!is_constant && found == positive.end()) {
      throw Error(Code::bundle, "the encoder does not give " + tensor.name + "; export the bundle again");
    }
    HostTensor here = is_constant ? constant(shape.constants.at(tensor.name)) : found->second;
    const std::string own = tensor.name + ".negative";
    if (!manifest.guided()) {
    } else if (tensor.negative == Negative::same || is_constant) {
      rows.emplace(own, here);
    } else if (tensor.negative == Negative::zeros || negative == nullptr) {
      rows.emplace(own, zeros_like(here));
    } else {
      const auto other = negative->find(own);
      rows.emplace(own, other != negative->end() ? other->second : negative->at(tensor.name));
    }
    rows.emplace(tensor.name + ".positive", std::move(here));
  }
  return rows;
}

}  // namespace

Request::Request(const std::shared_ptr<const Session>& session, std::shared_ptr<Pool> pool, const Ask& ask)
    : session_(session), pool_(std::move(pool)), interrupt_(session->engine()->interrupt()) {
  check(ask);
  if (pool_ == nullptr) {
    pool_ = std::make_shared<Pool>(session_, ask.image_size, std::vector<std::string>{ask.plan.empty() ? "default" : ask.plan},
                                   ask.images, true);
  } else if (!ask.image_size.empty() && ask.image_size != pool_->shape().size()) {
    refuse("the pool is for " + pool_->shape().size() + ", the request asks for " + shown(ask.image_size));
  }
  if (ask.images > pool_->free_rows()) {
    refuse("the pool has room for " + std::to_string(pool_->free_rows()) + " more images, got " + std::to_string(ask.images) +
           "; free a request of it, or make a larger one");
  }
  for (std::size_t i = 0; i < ask.images; ++i) {
    images_.push_back(std::make_unique<Image>());
    images_.back()->row = SIZE_MAX;
    views_.push_back(images_.back().get());
  }
  scratch_.resize(static_cast<std::size_t>(pool_->shape().latents_count()));
  try {
    for (Image* image : views_) {
      pool_->place(*image);
    }
    begin(ask);
  } catch (...) {
    for (Image* image : views_) {
      pool_->release(*image);
    }
    throw;
  }
}

Request::~Request() {
  for (Image* image : views_) {
    pool_->release(*image);
  }
}

void Request::check(const Ask& ask) const {
  const Manifest& manifest = session_->manifest();
  const std::vector<const Shape*>& shapes = session_->shapes(pool_ != nullptr ? pool_->shape().size() : ask.image_size);
  const auto by = [&manifest](Source source) {
    return std::any_of(manifest.conditioning.begin(), manifest.conditioning.end(),
                       [source](const Conditioning& each) { return each.source == source; });
  };
  const bool by_picture = find_role(shapes, Role::image) != nullptr || by(Source::image);
  if (by_picture && by(Source::text) && !(ask.tensors && !ask.prompt && !ask.ids && ask.picture == nullptr)) {
    refuse(shown(manifest.model) + " is conditioned by a prompt and a picture at once, which libtgate does not encode: " +
           "give tensors that hold what both are encoded to, or draw with the Python runtime");
  }
  const int ways = (ask.prompt ? 1 : 0) + (ask.ids ? 1 : 0) + (ask.tensors ? 1 : 0) + (ask.picture != nullptr ? 1 : 0);
  if (ways != 1 || (by_picture && (ask.prompt || ask.ids)) || (!by_picture && ask.picture != nullptr)) {
    refuse(shown(manifest.model) + " is conditioned by " +
           (by_picture ? "a picture: give picture, or tensors" : "a prompt: give prompt, ids, or tensors") +
           ", and nothing else; got " + std::to_string(ways) + " of these");
  }
  if ((ask.negative_prompt && !ask.prompt) || (ask.negative_ids && !ask.ids)) {
    refuse("a negative prompt goes with a prompt, and negative ids with ids; tensors hold the negative half already");
  }
  if ((ask.prompt || ask.ids) && find_role(shapes, Role::text) == nullptr) {
    refuse("the bundle has no text encoder (--components): give tensors, which `tgate embed` makes");
  }
  if (ask.picture != nullptr && find_role(shapes, Role::image) == nullptr) {
    refuse("the bundle has no image encoder (--components): give tensors");
  }
  for (const auto* ids : {&ask.ids, &ask.negative_ids}) {
    if (*ids && (*ids)->size() != manifest.tokenizers.size()) {
      refuse("the bundle has " + std::to_string(manifest.tokenizers.size()) + " tokenizers, got ids of " +
             std::to_string((*ids)->size()));
    }
    for (std::size_t i = 0; *ids && i < (*ids)->size(); ++i) {
      if ((**ids)[i].size() > static_cast<std::size_t>(manifest.tokenizers[i].length)) {
        refuse("tokenizer " + std::to_string(i) + " has a length of " + std::to_string(manifest.tokenizers[i].length) +
               ", got " + std::to_string((**ids)[i].size()) + " ids");
      }
    }
  }
  rows_of_calls(shapes, ask.images);
  if (ask.seed >= seed_limit || ask.images > seed_limit - ask.seed) {
    refuse("image j has the seed s + j, which must be below " + std::to_string(seed_limit) + "; got " +
           std::to_string(ask.seed) + " for " + std::to_string(ask.images) + " images");
  }
  const auto count = static_cast<std::size_t>(shapes.front()->latents_count());
  if (ask.initial_latents != nullptr && ask.initial_latents_count != count * ask.images) {
    refuse("initial latents must be " + std::to_string(count * ask.images) + " numbers of float32, standard normal noise, got " +
           std::to_string(ask.initial_latents_count));
  }
}

float Request::guidance(double asked) const {
  const Manifest& manifest = session_->manifest();
  if (asked == 0) {
    return static_cast<float>(program_->plan->guidance_scale);
  }
  if (!(std::fabs(asked) <= most_scale)) {
    refuse("the guidance scale must be finite and at most 1000000, got " + json::repr(asked));
  }
  if (manifest.guided() && asked <= 1) {
    refuse("the bundle was exported with guidance, which takes a scale above 1, got " + json::repr(asked) +
           "; export with --guidance-scale 1 for a bundle without guidance");
  }
  if (manifest.guidance == Guidance::none && asked > 1) {
    refuse("the bundle was exported without guidance and takes no scale above 1, got " + json::repr(asked) +
           "; export with a --guidance-scale above 1");
  }
  return static_cast<float>(asked);
}

void Request::begin(const Ask& ask) {
  const Manifest& manifest = session_->manifest();
  const Shape& shape = pool_->shape();
  program_ = program_ != nullptr ? program_ : &pool_->program(ask.plan);
  const float scale = guidance(ask.guidance_scale);
  std::string cut;

  std::map<std::string, HostTensor, std::less<>> rows;
  const auto encode = [&](const std::optional<std::string>& prompt, const std::optional<Ask::Ids>& given) {
    Ask::Ids ids;
    if (prompt) {
      for (Encoding& encoding : session_->tokenize(*prompt)) {
        if (encoding.cut.size() > cut.size()) {
          cut = std::move(encoding.cut);
        }
        ids.push_back(std::move(encoding.ids));
      }
    } else {
      ids = *given;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        ids[i].resize(static_cast<std::size_t>(manifest.tokenizers[i].length), manifest.tokenizers[i].pad_id);
      }
    }
    return session_->encode_text(ids);
  };
  if (ask.prompt || ask.ids) {
    const HostTensors positive = encode(ask.prompt, ask.ids);
    const bool given = ask.negative_prompt || ask.negative_ids;
    std::optional<HostTensors> negative;
    if (manifest.guided() && given) {
      negative = encode(ask.negative_prompt, ask.negative_ids);
    } else if (manifest.guided() && !manifest.zero_negative) {
      if (!ask.prompt) {
        refuse("the model's negative half is the empty prompt's: give negative_ids beside ids");
      }
      negative = encode("", {});
    }
    rows = halves(manifest, shape, positive, negative ? &*negative : nullptr);
  } else if (ask.tensors) {
    for (const auto& [name, tensor] : *ask.tensors) {
      if (!rows.emplace(name, tensor).second) {
        refuse("tensor '" + shown(name) + "' is given twice");
      }
    }
    for (const Conditioning& tensor : manifest.conditioning) {
      for (const char* half : {".negative", ".positive"}) {
        if (tensor.source == Source::constant) {
          rows.emplace(tensor.name + half, constant(shape.constants.at(tensor.name)));
        }
      }
    }
    for (const auto& [name, tensor] : *ask.tensors) {
      const auto& known = pool_->halves();
      const auto own = [&given = name](const Conditioning& each) {
        return given == each.name + ".negative" || given == each.name + ".positive";
      };
      const auto& all = manifest.conditioning;
      if (std::find(known.begin(), known.end(), name) == known.end() && std::none_of(all.begin(), all.end(), own)) {
        refuse("the bundle is not conditioned by a tensor '" + shown(name) + "'");
      }
    }
  }

  const std::size_t count = scratch_.size();
  for (std::size_t i = 0; i < images_.size(); ++i) {
    Image& image = *images_[i];
    image.program = program_;
    image.position = 0;
    image.guidance_scale = scale;
    image.seed = ask.seed + i;
    image.generator = ask.generator;
    if (ask.picture != nullptr) {
      rows = halves(manifest, shape, session_->encode_picture(shape, ask.picture, ask.picture_bytes, image.seed), nullptr);
    }
    Halves conditioning;
    for (const auto& [name, tensor] : rows) {
      conditioning.emplace(name, &tensor);
    }
    const float* noise = scratch_.data();
    if (ask.initial_latents != nullptr) {
      noise = ask.initial_latents + i * count;
    } else {
      draw_noise(image.generator, image.seed, initial_draw, scratch_.data(), count);
      if (image.generator == Generator::torch_cuda) {
        round_to(manifest.dtype, scratch_.data(), count);
      }
    }
    pool_->begin(image, noise, conditioning);
  }
  cut_ = std::move(cut);
  on_step_ = ask.on_step;
  fault_.clear();
  const std::lock_guard<std::mutex> lock(guard_);
  interrupt_->clear();
  cancelled_.store(false, std::memory_order_release);
}

void Request::reset(const Ask& ask) {
  if ((!ask.plan.empty() && &session_->plan(ask.plan) != program_->plan) || ask.images != images_.size()) {
    refuse("a request is reset with the plan and the images that it was made with: '" + shown(program_->plan->name) + "' and " +
           std::to_string(images_.size()));
  }
  if (!ask.image_size.empty() && ask.image_size != pool_->shape().size()) {
    refuse("a request is reset at the size that it was made for: " + pool_->shape().size());
  }
  check(ask);
  cancelled_.store(true, std::memory_order_release);  // until it has begun
  begin(ask);
}

void Request::cancel() noexcept {
  const std::lock_guard<std::mutex> lock(guard_);
  cancelled_.store(true, std::memory_order_release);
  interrupt_->set();
}

void Request::check_usable() const {
  if (cancelled()) {
    throw Error(Code::cancelled, "the request was cancelled; reset it, or free it");
  }
  if (!fault_.empty()) {
    throw Error(Code::engine, fault_);
  }
}

void Request::step() {
  check_usable();
  if (done()) {
    return;
  }
  try {
    pool_->step(views_.data(), views_.size(), interrupt_.get());
  } catch (const std::exception& error) {
    failed(error);
    check_usable();
    throw;
  }
  after_step();
  check_usable();
}

void Request::failed(const std::exception& fault) {
  const auto* error = dynamic_cast<const Error*>(&fault);
  if (error == nullptr || error->code() != Code::request) {  // such a one is told before the engine runs
    fault_ = fault.what();
  }
}

void Request::after_step() {
  if (done()) {
    for (std::size_t i = 0; i < images_.size() && fault_.empty(); ++i) {
      try {
        pool_->latents(*images_[i], scratch_.data());
        check_computed(scratch_.data(), scratch_.size(), Dtype::float32, "the final latents of an image");
      } catch (const Error& error) {
        failed(error);
      }
    }
  }
  if (fault_.empty() && on_step_ && !on_step_()) {
    cancel();
  }
}

void step_together(Request* const* requests, std::size_t count, std::int32_t* stopped) {
  thread_local std::vector<Image*> images;  // its room stays, so that a step allocates nothing
  images.clear();
  Pool* pool = count > 0 ? requests[0]->pool_.get() : nullptr;
  const std::string* graph = nullptr;
  // Whether a request takes part is decided here: one that is cancelled meanwhile is left out of the next batch.
  struct Marks {
    Request* const* requests;
    std::size_t count = 0;
    ~Marks() {
      for (std::size_t i = 0; i < count; ++i) {
        requests[i]->in_batch_ = false;
      }
    }
  } marks{requests};
  for (std::size_t i = 0; i < count; ++i) {
    Request& request = *requests[i];
    if (request.in_batch_) {
      throw Error(Code::argument, "a request is twice in a batch");
    }
    if (request.pool_.get() != pool) {
      refuse("requests that share a call are made in one pool; got two of different pools");
    }
    const bool usable = !request.cancelled() && request.fault_.empty();
    if (stopped != nullptr) {
      stopped[i] = usable ? 0 : 1;
    }
    if (!usable) {
      continue;
    }
    if (request.done()) {
      refuse("a request of the batch is at its end; leave it out");
    }
    const std::string& own = pool->graph_name(request.program_->moves[request.position()].graph);
    if (graph != nullptr && own != *graph) {
      refuse("requests that share a call run one graph; got " + *graph + " and " + own);
    }
    graph = &own;
    request.in_batch_ = true;
    marks.count = i + 1;
    images.insert(images.end(), request.views_.begin(), request.views_.end());
  }
  try {
    pool == nullptr ? void() : pool->step(images.data(), images.size(), nullptr);
  } catch (const std::exception& error) {
    for (std::size_t i = 0; i < count; ++i) {
      if (requests[i]->in_batch_) {
        requests[i]->failed(error);
      }
    }
    throw;
  }
  for (std::size_t i = 0; i < count; ++i) {
    Request& request = *requests[i];
    if (request.in_batch_) {
      request.after_step();
      if (stopped != nullptr) {
        stopped[i] = request.cancelled() || !request.fault_.empty() ? 1 : 0;
      }
    }
  }
}

void Request::latents(std::size_t image, float* out) const {
  if (image >= images_.size()) {
    throw Error(Code::argument, "the request has " + std::to_string(images_.size()) + " images, got number " +
                                    std::to_string(image));
  }
  if (!fault_.empty()) {
    check_usable();
  }
  pool_->latents(*images_[image], out);
}

void Request::decode(std::size_t image, std::uint8_t* pixels, std::size_t bytes) {
  latents(image, scratch_.data());
  session_->decode(pool_->shape(), scratch_.data(), pixels, bytes);
}

}  // namespace tgate

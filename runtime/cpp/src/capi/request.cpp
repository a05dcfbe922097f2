// Sessions, pools and requests.
#include <algorithm>

#include "capi/handles.h"

using tgate::Code;
using tgate::Error;
using tgate::capi::guarded;
using tgate::capi::initialise;
using tgate::capi::needed;
using tgate::capi::put;
using tgate::capi::text_or;

namespace tgate::capi {
namespace {

tgate_session_options session_defaults() noexcept {
  tgate_session_options options{};
  options.engine = "ort-cpu";
  return options;
}

tgate_pool_options pool_defaults() noexcept {
  tgate_pool_options options{};
  options.images = 1;
  return options;
}

tgate_request_options request_defaults() noexcept {
  tgate_request_options options{};
  options.images = 1;
  options.generator = "numpy";
  return options;
}

Ask::Ids ids_of(const tgate_ids* ids, std::size_t count) {
  Ask::Ids all;
  for (std::size_t i = 0; i < count; ++i) {
    const tgate_ids& each = ids[i];
    constexpr std::size_t most = std::size_t{1} << 20;
    if ((each.ids == nullptr && each.count > 0) || each.count > most) {
      throw Error(Code::argument, "ids of tokenizer " + std::to_string(i) + " are " + std::to_string(each.count) +
                                      " at " + (each.ids == nullptr ? "NULL" : "an address"));
    }
    all.emplace_back(each.ids, each.ids + each.count);
  }
  return all;
}

std::vector<std::pair<std::string, HostTensor>> tensors_of(const tgate_tensor* tensors, std::size_t count) {
  constexpr std::size_t most = std::size_t{1} << 32;
  std::vector<std::pair<std::string, HostTensor>> all;
  for (std::size_t i = 0; i < count; ++i) {
    const std::string name = &needed(tensors[i].name, "a tensor's name");
    const float* data = &needed(tensors[i].data, "a tensor's data");
    if (tensors[i].count > most) {
      throw Error(Code::argument, "tensor " + shown(name) + " has " + std::to_string(tensors[i].count) + " elements");
    }
    HostTensor tensor{Dtype::float32, {1, static_cast<std::int64_t>(tensors[i].count)}, {}};
    tensor.data.resize(tensors[i].count * sizeof(float));
    std::memcpy(tensor.data.data(), data, tensor.data.size());
    all.emplace_back(name, std::move(tensor));
  }
  return all;
}

tgate_progress progress_of(const Request& request) noexcept {
  tgate_progress progress{};
  progress.size = sizeof progress;
  const auto& steps = request.program().plan->steps;
  progress.done = request.position();
  progress.total = steps.size();
  if (progress.done < progress.total) {
    progress.graph = steps[progress.done].graph.c_str();
    progress.phase = steps[progress.done].phase.c_str();
  }
  return progress;
}

tgate_picture_facts facts_of(const Session::Picture& picture) noexcept {
  tgate_picture_facts facts{};
  facts.bytes = picture.bytes();
  facts.width = static_cast<int32_t>(picture.width);
  facts.height = static_cast<int32_t>(picture.height);
  facts.frames = static_cast<int32_t>(picture.frames);
  return facts;
}

Ask ask_of(const tgate_request_options& options, tgate_request* handle) {
  Ask ask;
  ask.plan = text_or(options.plan, "");
  ask.image_size = text_or(options.image_size, "");
  ask.images = options.images;
  ask.seed = options.seed;
  ask.generator = generator_of(text_or(options.generator, "numpy"));
  ask.guidance_scale = options.guidance_scale;
  if (options.prompt != nullptr) {
    ask.prompt = options.prompt;
  }
  if (options.negative_prompt != nullptr) {
    ask.negative_prompt = options.negative_prompt;
  }
  if (options.ids != nullptr) {
    ask.ids = ids_of(options.ids, options.id_count);
  }
  if (options.negative_ids != nullptr) {
    ask.negative_ids = ids_of(options.negative_ids, options.id_count);
  }
  if (options.tensors != nullptr) {
    ask.tensors = tensors_of(options.tensors, options.tensor_count);
  }
  ask.picture = options.picture;
  ask.picture_bytes = options.picture_bytes;
  ask.initial_latents = options.initial_latents;
  ask.initial_latents_count = options.initial_latents_count;
  if (options.on_step != nullptr) {
    ask.on_step = [handle, call = options.on_step, data = options.user_data] {
      const tgate_progress progress = progress_of(*handle->request);
      return call(handle, &progress, data) == 0;
    };
  }
  return ask;
}

}  // namespace
}  // namespace tgate::capi

// --- sessions --------------------------------------------------------------------------------------------------------

tgate_code tgate_session_options_init(tgate_session_options* options, size_t size) {
  return initialise(options, size, tgate::capi::session_defaults());
}

tgate_code tgate_session_open(const tgate_bundle* bundle, const tgate_session_options* options, tgate_session** session,
                              tgate_error** error) {
  return guarded(error, [&] {
    const tgate_bundle& own = needed(bundle, "bundle");
    auto*& target = needed(session, "session");
    const auto chosen = tgate::capi::taken(options, tgate::capi::session_defaults(), "tgate_session_options");
    tgate::SessionOptions asked;
    asked.engine.name = text_or(chosen.engine, "ort-cpu");
    asked.engine.library = text_or(chosen.library, "");
    asked.engine.memory = text_or(chosen.memory, "");
    asked.engine.threads = chosen.threads;
    asked.engine.device = chosen.device;
    asked.engine.stream = chosen.stream;
    asked.engine.cuda_graphs = chosen.cuda_graphs != 0;
    asked.plans = tgate::capi::texts(chosen.plans, chosen.plan_count, "plans");
    asked.sizes = tgate::capi::texts(chosen.sizes, chosen.size_count, "sizes");
    auto made = std::make_unique<tgate_session>();
    made->session = tgate::Session::open(own.bundle, asked);
    target = made.release();
  });
}

tgate_code tgate_session_adapted(const tgate_session* session, const tgate_adapter* adapters, size_t count,
                                 tgate_session** adapted, tgate_error** error) {
  return guarded(error, [&] {
    const tgate_session& own = needed(session, "session");
    auto*& target = needed(adapted, "adapted");
    tgate::Scales scales;
    for (size_t i = 0; i < count; ++i) {
      const tgate_adapter& each = (&needed(adapters, "adapters"))[i];
      const std::string name = &needed(each.name, "the name of an adapter");
      if (!scales.emplace(name, each.scale).second) {
        throw Error(Code::request, "adapter '" + tgate::shown(name) + "' is given twice");
      }
    }
    auto made = std::make_unique<tgate_session>();
    made->session = own.session->adapted(scales);
    target = made.release();
  });
}

void tgate_session_free(tgate_session* session) { delete session; }

const char* tgate_session_engine(const tgate_session* session) {
  return session == nullptr ? "" : session->session->engine()->title().c_str();
}

const char* tgate_session_advice(const tgate_session* session) {
  return session == nullptr ? "" : session->session->advice().c_str();
}

// --- pools -----------------------------------------------------------------------------------------------------------

tgate_code tgate_pool_options_init(tgate_pool_options* options, size_t size) {
  return initialise(options, size, tgate::capi::pool_defaults());
}

tgate_code tgate_pool_create(const tgate_session* session, const tgate_pool_options* options, tgate_pool** pool,
                             tgate_error** error) {
  return guarded(error, [&] {
    const tgate_session& own = needed(session, "session");
    auto*& target = needed(pool, "pool");
    const auto chosen = tgate::capi::taken(options, tgate::capi::pool_defaults(), "tgate_pool_options");
    auto made = std::make_unique<tgate_pool>();
    made->pool = std::make_shared<tgate::Pool>(own.session, text_or(chosen.image_size, ""),
                                               tgate::capi::texts(chosen.plans, chosen.plan_count, "plans"), chosen.images,
                                               false);
    target = made.release();
  });
}

void tgate_pool_free(tgate_pool* pool) { delete pool; }
uint64_t tgate_pool_bytes(const tgate_pool* pool) { return pool == nullptr ? 0 : pool->pool->bytes(); }
size_t tgate_pool_free_images(const tgate_pool* pool) { return pool == nullptr ? 0 : pool->pool->free_rows(); }
uint64_t tgate_pool_moved_images(const tgate_pool* pool) { return pool == nullptr ? 0 : pool->pool->moved(); }

// --- requests --------------------------------------------------------------------------------------------------------

tgate_code tgate_progress_init(tgate_progress* progress, size_t size) { return initialise(progress, size, {}); }

tgate_code tgate_request_options_init(tgate_request_options* options, size_t size) {
  return initialise(options, size, tgate::capi::request_defaults());
}

tgate_code tgate_request_create(const tgate_session* session, const tgate_request_options* options,
                                tgate_request** request, tgate_error** error) {
  return guarded(error, [&] {
    const tgate_session& own = needed(session, "session");
    auto*& target = needed(request, "request");
    const auto chosen = tgate::capi::taken(&needed(options, "options"), tgate::capi::request_defaults(), "tgate_request_options");
    auto made = std::make_unique<tgate_request>();
    const tgate::Ask ask = tgate::capi::ask_of(chosen, made.get());
    std::shared_ptr<tgate::Pool> pool = chosen.pool == nullptr ? nullptr : chosen.pool->pool;
    if (pool != nullptr && &pool->session() != own.session.get()) {
      throw Error(Code::request, "the pool is of another session");
    }
    const auto use = pool == nullptr ? nullptr : std::make_unique<tgate::Pool::Use>(*pool);
    made->request = std::make_unique<tgate::Request>(own.session, pool, ask);
    target = made.release();
  });
}

void tgate_request_free(tgate_request* request) { delete request; }

tgate_code tgate_request_reset(tgate_request* request, const tgate_request_options* options, tgate_error** error) {
  return guarded(error, [&] {
    tgate_request& own = needed(request, "request");
    const auto chosen = tgate::capi::taken(&needed(options, "options"), tgate::capi::request_defaults(), "tgate_request_options");
    if (chosen.pool != nullptr && chosen.pool->pool != own.request->pool()) {
      throw Error(Code::request, "a request is reset in the pool that it was made in");
    }
    const tgate::Pool::Use use(*own.request->pool());
    own.request->reset(tgate::capi::ask_of(chosen, request));
  });
}

tgate_code tgate_request_step(tgate_request* request, tgate_error** error) {
  return guarded(error, [&] {
    tgate::Request& own = *needed(request, "request").request;
    const tgate::Pool::Use use(*own.pool());
    own.step();
  });
}

tgate_code tgate_request_run(tgate_request* request, tgate_error** error) {
  return guarded(error, [&] {
    tgate::Request& own = *needed(request, "request").request;
    const tgate::Pool::Use use(*own.pool());
    own.check_usable();
    while (!own.done()) {
      own.step();
    }
  });
}

tgate_code tgate_batch(tgate_request* const* requests, size_t count, int32_t* stopped, tgate_error** error) {
  return guarded(error, [&] {
    // Its room stays, so that a step allocates nothing; a callback that steps another pool's requests has another.
    thread_local std::vector<tgate::Request*> spare;
    std::vector<tgate::Request*> all;
    all.swap(spare);
    all.clear();
    for (std::size_t i = 0; i < count; ++i) {
      all.push_back(needed((&needed(requests, "requests"))[i], "a request").request.get());
    }
    if (all.empty()) {
      throw Error(Code::argument, "a batch of no requests");
    }
    const tgate::Pool::Use use(*all.front()->pool());
    tgate::step_together(all.data(), all.size(), stopped);
    all.swap(spare);
  });
}

void tgate_request_cancel(tgate_request* request) {
  if (request != nullptr) {
    request->request->cancel();
  }
}

tgate_code tgate_request_progress(const tgate_request* request, tgate_progress* progress, tgate_error** error) {
  return guarded(error, [&] {
    put(needed(progress, "progress"), tgate::capi::progress_of(*needed(request, "request").request), "tgate_progress");
  });
}

const char* tgate_request_cut(const tgate_request* request) {
  return request == nullptr ? "" : request->request->cut().c_str();
}

size_t tgate_request_latents_count(const tgate_request* request) {
  return request == nullptr ? 0 : static_cast<size_t>(request->request->pool()->shape().latents_count());
}

size_t tgate_request_latents_shape(const tgate_request* request, int64_t shape[8]) {
  if (request == nullptr || shape == nullptr) {
    return 0;
  }
  const auto& own = request->request->pool()->shape().latents;
  std::copy(own.begin(), own.end(), shape);
  return own.size();
}

tgate_code tgate_request_latents(const tgate_request* request, size_t image, float* latents, size_t count,
                                 tgate_error** error) {
  return guarded(error, [&] {
    const tgate::Request& own = *needed(request, "request").request;
    float* out = &needed(latents, "latents");
    if (count < tgate_request_latents_count(request)) {
      throw Error(Code::argument, "latents are " + std::to_string(tgate_request_latents_count(request)) +
                                      " numbers, got room for " + std::to_string(count));
    }
    own.latents(image, out);
  });
}

tgate_code tgate_picture_facts_init(tgate_picture_facts* facts, size_t size) { return initialise(facts, size, {}); }

tgate_code tgate_request_picture_facts(const tgate_request* request, tgate_picture_facts* facts, tgate_error** error) {
  return guarded(error, [&] {
    const auto picture = needed(request, "request").request->picture();
    put(needed(facts, "facts"), tgate::capi::facts_of(picture), "tgate_picture_facts");
  });
}

tgate_code tgate_session_picture_facts(const tgate_session* session, const char* image_size, tgate_picture_facts* facts,
                                       tgate_error** error) {
  return guarded(error, [&] {
    const tgate::Session& own = *needed(session, "session").session;
    const auto picture = own.picture(*own.shapes(text_or(image_size, "")).front());
    put(needed(facts, "facts"), tgate::capi::facts_of(picture), "tgate_picture_facts");
  });
}

tgate_code tgate_session_decode(const tgate_session* session, const char* image_size, const float* latents, size_t count,
                                uint8_t* pixels, size_t bytes, tgate_error** error) {
  return guarded(error, [&] {
    const tgate::Session& own = *needed(session, "session").session;
    const float* from = &needed(latents, "latents");
    std::uint8_t* to = &needed(pixels, "pixels");
    const tgate::Shape& shape = *own.shapes(text_or(image_size, "")).front();
    if (count != static_cast<std::size_t>(shape.latents_count())) {
      throw Error(Code::argument, "latents of " + shape.size() + " are " + std::to_string(shape.latents_count()) +
                                      " numbers, got " + std::to_string(count));
    }
    own.decode(shape, from, to, bytes);
  });
}

tgate_code tgate_request_decode(tgate_request* request, size_t image, uint8_t* pixels, size_t bytes, tgate_error** error) {
  return guarded(error, [&] { needed(request, "request").request->decode(image, &needed(pixels, "pixels"), bytes); });
}

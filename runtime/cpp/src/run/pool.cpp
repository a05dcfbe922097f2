#include "run/pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "contract/error.h"
#include "contract/numbers.h"

namespace tgate {
namespace {

constexpr std::size_t most_images = 1U << 16;
constexpr int guidance_column = 2;

std::string past(const char* name, int lag) { return lag == 0 ? name : std::string(name) + "." + std::to_string(lag); }

std::string ranges_of(const std::vector<const Shape*>& shapes) {
  std::string text;
  for (const Shape* shape : shapes) {
    const Range& batch = shape->batch;
    text += (text.empty() ? "" : " or ") + std::to_string(batch.least) +
            (batch.least < batch.most ? " to " + std::to_string(batch.most) : "");
  }
  return text;
}

}  // namespace

std::pair<std::size_t, std::size_t> next_call(const std::vector<const Shape*>& shapes, std::size_t left) {
  std::size_t taken = 0;
  for (const Shape* shape : shapes) {
    const auto least = static_cast<std::size_t>(shape->batch.least), most = static_cast<std::size_t>(shape->batch.most);
    if (least <= left) {
      taken = std::max(taken, std::min(most, left));
    }
  }
  const auto smallest = static_cast<std::size_t>(shapes.front()->batch.least);
  return taken > 0 ? std::make_pair(taken, taken) : std::make_pair(left, smallest);
}

std::size_t rows_of_calls(const std::vector<const Shape*>& shapes, std::size_t images) {
  if (images < 1 || images > most_images) {
    throw Error(Code::request, "the number of images must be 1 to " + std::to_string(most_images) + ", got " +
                                   std::to_string(images));
  }
  std::size_t rows = 0;
  while (images > 0) {
    const auto [taken, called] = next_call(shapes, images);
    rows += called;
    images -= taken;
  }
  return rows;
}

Pool::Pool(std::shared_ptr<const Session> session, std::string_view size, const std::vector<std::string>& plans,
           std::size_t images, bool together)
    : session_(std::move(session)), engine_(session_->engine()), shapes_(session_->shapes(size)) {
  // Images that go together in part leave room for what fills up a call that takes more.
  const auto least = static_cast<std::size_t>(shapes_.front()->batch.least);
  const std::size_t own = rows_of_calls(shapes_, images), rows = together ? own : images + least - 1;
  std::vector<const Plan*> chosen;
  for (const std::string& name : plans) {
    chosen.push_back(&session_->plan(name));
  }
  if (chosen.empty()) {
    chosen.push_back(&session_->plan("default"));
  }
  // What a session has loaded, it has checked (check_forms): every tensor has a row for each image, and latents and step
  // rows are of the lengths that every step takes them for. Buffers are made of nothing else.
  for (const Plan* plan : chosen) {
    for (const std::string& name : plan->graphs()) {
      for (const Shape* each : shapes_) {
        const GraphSpec* spec = tgate::find(each->graphs, name);
        if (spec == nullptr) {
          throw Error(Code::plan, "plan '" + shown(plan->name) + "' runs graph '" + shown(name) + "', which " + each->size() +
                                      " does not have");
        }
        static_cast<void>(session_->graph(*spec));
      }
    }
  }
  const Graphs& graphs = shape().graphs;
  for (TensorSpec& tensor : buffers_of(graphs, chosen)) {
    const std::size_t row_bytes = static_cast<std::size_t>(tensor.bytes(1));
    if (row_bytes > SIZE_MAX / rows) {
      throw Error(Code::memory, "there is no memory for " + std::to_string(images) + " images; ask for fewer at once");
    }
    bytes_ += row_bytes * rows;
    buffers_.push_back({std::move(tensor), row_bytes, engine_->allocate(row_bytes * rows)});
  }
  for (int lag = 0; lag <= history; ++lag) {
    latents_[static_cast<std::size_t>(lag)] = find(past("latents", lag));
    outputs_[static_cast<std::size_t>(lag)] = find(past("output", lag));
  }
  noise_ = find("noise");
  const auto address = [&](std::size_t index) { return index < buffers_.size() ? buffers_[index].at(0) : nullptr; };
  for (std::size_t lag = 0; lag <= history; ++lag) {
    steady_.latents[lag] = address(latents_[lag]);
    steady_.outputs[lag] = address(outputs_[lag]);
  }
  steady_.next_latents = address(find("next_latents"));
  steady_.step = address(find("step"));
  steady_.noise = address(noise_);
  steady_.row_bytes = static_cast<std::size_t>(shape().latents_count()) * sizeof(float);
  for (const Conditioning& tensor : session_->manifest().conditioning) {
    for (const char* half : {".negative", ".positive"}) {
      if (const std::size_t index = find(tensor.name + half); index < buffers_.size()) {
        half_names_.push_back(tensor.name + half);
        half_buffers_.push_back(index);
      }
    }
  }
  for (const Plan* plan : chosen) {
    plan->check(graphs, session_->manifest().carries);
    compile(*plan);
  }
  const std::size_t used = graphs_.size();
  for (std::size_t graph = 0; graph < used; ++graph) {
    std::set<std::string> all;
    for (const GraphUse& each : graphs_) {
      if (each.name == graphs_[graph].name) {
        all.insert(each.writes.begin(), each.writes.end());
      }
    }
    const std::size_t whole = use_of(graphs_[graph].name, {all.begin(), all.end()});
    graphs_[graph].whole = whole;
  }
  rows_.resize(rows);
  marks_.resize(rows);
  ordered_.reserve(rows);
  drawn_.resize(static_cast<std::size_t>(shape().latents_count()));
  numbers_.resize(rows * step_row_length);
  free_ = images;
  interrupt_ = engine_->interrupt();
  // What a pool is for, bound now: calls on all of its images. Others are bound when they are first made.
  if (const auto [taken, called] = next_call(shapes_, images); taken == images) {
    for (std::size_t graph = 0; graph < used; ++graph) {
      call(graph, 0, called);
    }
  }
}

std::size_t Pool::find(std::string_view name) const {
  const auto found = std::find_if(buffers_.begin(), buffers_.end(), [&](const Buffer& b) { return b.tensor.name == name; });
  return static_cast<std::size_t>(found - buffers_.begin());
}

std::size_t Pool::use_of(const std::string& graph, std::vector<std::string> writes) {
  std::sort(writes.begin(), writes.end());
  const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                  [&](const GraphUse& each) { return each.name == graph && each.writes == writes; });
  const auto index = static_cast<std::size_t>(found - graphs_.begin());
  if (found == graphs_.end()) {
    graphs_.push_back({graph, std::move(writes), index});
  }
  return index;
}

void Pool::compile(const Plan& plan) {
  auto program = std::make_unique<Program>();
  program->plan = &plan;
  program->reach = plan.reach();
  for (const Step& step : plan.steps) {
    Program::Move move{use_of(step.graph, {step.writes.begin(), step.writes.end()}), {}, step.call.noise != 0, {}};
    move.row[0] = static_cast<float>(step.call.timestep);
    move.row[1] = static_cast<float>(step.call.input_scale);
    move.row[3] = static_cast<float>(step.call.noise);
    for (std::size_t lag = 0; lag <= history; ++lag) {
      move.row[4 + lag] = static_cast<float>(step.call.latents[lag]);
      move.row[5 + history + lag] = static_cast<float>(step.call.outputs[lag]);
    }
    program->moves.push_back(std::move(move));
  }
  std::set<std::size_t> live;
  for (std::size_t position = plan.steps.size(); position-- > 0;) {
    const Step& step = plan.steps[position];
    for (const std::string& name : step.writes) {
      live.erase(find(name));
    }
    for (const std::string& name : step.reads) {
      live.insert(find(name));
    }
    program->moves[position].live.assign(live.begin(), live.end());
  }
  programs_.push_back(std::move(program));
}

const Program& Pool::program(std::string_view name) const {
  std::string have;
  for (const auto& each : programs_) {
    if (name.empty() && programs_.size() == 1) {
      return *each;
    }
    have += (have.empty() ? "" : ", ") + shown(each->plan->name);
  }
  const Plan* wanted = &session_->plan(name.empty() ? "default" : name);
  for (const auto& each : programs_) {
    if (each->plan == wanted) {
      return *each;
    }
  }
  throw Error(Code::request, "plan '" + shown(name.empty() ? "default" : name) + "' is none of the pool's: " + have);
}

Pool::Use::Use(Pool& pool) : pool_(pool) {
  if (pool.busy_.test_and_set(std::memory_order_acquire)) {
    throw Error(Code::argument, "the pool is in use, by another thread or from a callback; requests of one pool belong to one "
                                "thread at a time");
  }
}

// --- places ----------------------------------------------------------------------------------------------------------

void Pool::place(Image& image) {
  if (image.row < rows_.size() && rows_[image.row] == &image) {
    return;
  }
  const auto empty = std::find(rows_.begin(), rows_.end(), nullptr);
  if (free_ == 0 || empty == rows_.end()) {
    throw Error(Code::request, "the pool has no room left; free a request of it, or make a larger one");
  }
  *empty = &image;
  image.row = static_cast<std::size_t>(empty - rows_.begin());
  --free_;
}

void Pool::release(Image& image) noexcept {
  if (image.row < rows_.size() && rows_[image.row] == &image) {
    rows_[image.row] = nullptr;
    ++free_;
  }
}

void Pool::move_row(std::size_t from, std::size_t to) {
  Image& image = *rows_[from];
  const auto copy = [&](std::size_t index) {
    if (index < buffers_.size()) {
      const Buffer& each = buffers_[index];
      engine_->copy(each.at(to), each.at(from), each.row_bytes);
    }
  };
  for (std::size_t lag = 0; lag <= history; ++lag) {
    copy(latents_[lag]);
    copy(outputs_[lag]);
  }
  std::for_each(half_buffers_.begin(), half_buffers_.end(), copy);
  if (image.program != nullptr && image.position < image.program->moves.size()) {
    const auto& live = image.program->moves[image.position].live;
    std::for_each(live.begin(), live.end(), copy);
  }
  rows_[to] = &image;
  rows_[from] = nullptr;
  image.row = to;
  ++moved_;
}

void Pool::swap_rows(std::size_t one, std::size_t other) {
  for (const Buffer& each : buffers_) {
    engine_->swap(each.at(one), each.at(other), each.row_bytes);
  }
  std::swap(rows_[one], rows_[other]);
  rows_[one]->row = one;
  rows_[other]->row = other;
  moved_ += 2;
}

std::size_t Pool::gather(Image* const* images, std::size_t count, std::size_t rows) {
  if (rows == count && neighbours(images, count)) {
    return images[0]->row;
  }
  // 0 for nobody, 1 for somebody else, 2 for one of the images.
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    marks_[row] = rows_[row] == nullptr ? 0 : 1;
  }
  std::size_t lowest = rows_.size();
  for (std::size_t i = 0; i < count; ++i) {
    marks_[images[i]->row] = 2;
    lowest = std::min(lowest, images[i]->row);
  }
  // The stretch of rows that holds most of them, then the fewest others, then the first: whoever is there stays there.
  std::size_t best = 0, most = 0, fewest = SIZE_MAX, own = 0, others = 0;
  const auto add = [&](std::size_t row) { own += marks_[row] == 2, others += marks_[row] == 1; };
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    add(row);
    if (row >= rows) {
      own -= marks_[row - rows] == 2, others -= marks_[row - rows] == 1;
    }
    // Where there are more rows than images, those have to begin the stretch if none is to move.
    const bool ends_here = row + 1 >= rows, begins_well = rows == count || row + 1 - rows == lowest;
    if (ends_here && (own > most || (own == most && (others < fewest || (others == fewest && begins_well))))) {
      best = row + 1 - rows, most = own, fewest = others;
    }
  }
  // The images come to the front of the stretch; what is behind them there becomes nobody's.
  const std::size_t behind = best + count, end = best + rows;
  const auto next = [&](std::uint8_t wanted, std::size_t from) {
    for (std::size_t row = from; row < rows_.size(); ++row) {
      const bool counts = wanted == 2 ? row < best || row >= behind : row < best || row >= end;
      if (counts && marks_[row] == wanted) {
        return row;
      }
    }
    return rows_.size();
  };
  const auto move = [&](std::size_t from, std::size_t to) {
    move_row(from, to);
    std::swap(marks_[from], marks_[to]);
  };
  std::size_t from = 0;
  for (std::size_t row = best; row < behind; ++row) {
    if (marks_[row] == 2) {
      continue;
    }
    from = next(2, from);
    if (marks_[row] == 1) {
      const std::size_t empty = next(0, 0);
      if (empty == rows_.size()) {
        swap_rows(from, row);
        std::swap(marks_[from], marks_[row]);
        continue;
      }
      move(row, empty);
    }
    move(from, row);
  }
  for (std::size_t row = behind; row < end; ++row) {
    if (marks_[row] == 1) {
      move(row, next(0, 0));
    }
  }
  return best;
}

// --- images ----------------------------------------------------------------------------------------------------------

void Pool::begin(Image& image, const float* noise, const Halves& conditioning) {
  session_->check_unchanged();
  const std::size_t count = drawn_.size();
  const auto zeros = [&](std::size_t index) {
    if (index < buffers_.size()) {
      const Buffer& each = buffers_[index];
      encoded_.assign(each.row_bytes, std::byte{0});
      engine_->upload(each.at(image.row), encoded_.data(), each.row_bytes);
    }
  };
  for (std::size_t lag = 0; lag <= history; ++lag) {
    zeros(latents_[lag]);
    zeros(outputs_[lag]);
  }
  zeros(noise_);
  const auto scale = static_cast<float>(image.program->plan->initial_scale);
  for (std::size_t i = 0; i < count; ++i) {
    drawn_[i] = noise[i] * scale;
  }
  check_given(drawn_.data(), count, Dtype::float32, "the initial latents");
  const Buffer& start = buffers_[latents_[0]];
  engine_->upload(start.at(image.row), drawn_.data(), start.row_bytes);
  for (std::size_t i = 0; i < half_names_.size(); ++i) {
    const Buffer& to = buffers_[half_buffers_[i]];
    const auto found = conditioning.find(half_names_[i]);
    if (found == conditioning.end()) {
      throw Error(Code::request, "the plan's graphs take conditioning " + half_names_[i] + ", which is not given");
    }
    const HostTensor& given = *found->second;
    const auto elements = static_cast<std::size_t>(to.tensor.elements(1));
    const bool floats = given.dtype == Dtype::float32 && to.tensor.dtype != Dtype::int64 && to.tensor.dtype != Dtype::uint8;
    if (given.elements() != elements || (given.dtype != to.tensor.dtype && !floats)) {
      throw Error(Code::request, "conditioning " + half_names_[i] + " must be " + std::to_string(elements) + " of " +
                                     std::string(facts_of(to.tensor.dtype).name) + ", got " +
                                     std::to_string(given.elements()) + " of " + std::string(facts_of(given.dtype).name));
    }
    const void* stored = given.data.data();
    if (given.dtype != to.tensor.dtype) {
      std::vector<float> numbers(elements);
      std::memcpy(numbers.data(), given.data.data(), given.data.size());
      encoded_.resize(to.row_bytes);
      encode(numbers.data(), elements, to.tensor.dtype, encoded_.data());
      stored = encoded_.data();
    }
    check_given(stored, elements, to.tensor.dtype, "conditioning " + half_names_[i]);
    engine_->upload(to.at(image.row), stored, to.row_bytes);
  }
  image.position = 0;
}

void Pool::latents(const Image& image, float* out) const {
  const Buffer& each = buffers_[latents_[0]];
  engine_->download(out, each.at(image.row), each.row_bytes);
}

// --- steps -----------------------------------------------------------------------------------------------------------

void Pool::step(Image* const* images, std::size_t count, Interrupt* interrupt) {
  if (count == 0) {
    return;
  }
  Interrupt& ends = interrupt != nullptr ? *interrupt : *interrupt_;
  // Mostly they are where they were in the step before, one behind the other, and one call takes them all. Short for a
  // reason: after an engine's call every line of this is fetched from memory.
  if (count == steady_.together && neighbours(images, count)) {
    run(images, count, images[0]->row, count, ends);
    return;
  }
  const std::size_t rows = rows_of_calls(shapes_, count), first = gather(images, count, rows);
  const auto place = rows_.begin() + static_cast<std::ptrdiff_t>(first);
  ordered_.assign(place, place + static_cast<std::ptrdiff_t>(count));
  const auto [all, called_once] = next_call(shapes_, count);
  steady_.together = all == count && called_once == count ? count : 0;
  std::size_t done = 0;
  while (done < count) {
    const auto [taken, called] = next_call(shapes_, count - done);
    run(ordered_.data() + done, taken, first + done, called, ends);
    done += taken;
  }
}

bool Pool::neighbours(Image* const* images, std::size_t count) {
  for (std::size_t i = 1; i < count; ++i) {
    if (images[i]->row != images[0]->row + i) {
      return false;
    }
  }
  return true;
}

void Pool::run(Image* const* images, std::size_t count, std::size_t first, std::size_t rows, Interrupt& interrupt) {
  std::size_t graph = images[0]->program->moves[images[0]->position].graph;
  int reach = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Image& image = *images[i];
    const Program::Move& move = image.program->moves[image.position];
    float* row = numbers_.data() + i * step_row_length;
    std::memcpy(row, move.row.data(), sizeof move.row);
    row[guidance_column] = image.guidance_scale;
    graph = move.graph == graph ? graph : graphs_[graph].whole;
    reach = std::max(reach, image.program->reach);
    if (move.noise && steady_.noise != nullptr) {
      draw_step_noise(image);
    }
  }
  constexpr std::size_t row_bytes = step_row_length * sizeof(float);
  engine_->upload(steady_.step + first * row_bytes, numbers_.data(), count * row_bytes);
  call(graph, first, rows).run(interrupt);
  turn(first, count, reach);
  for (std::size_t i = 0; i < count; ++i) {
    ++images[i]->position;
  }
}

void Pool::draw_step_noise(const Image& image) {
  draw_noise(image.generator, image.seed, draw_of_step(image.position), drawn_.data(), drawn_.size());
  if (image.generator == Generator::torch_cuda) {
    round_to(session_->manifest().dtype, drawn_.data(), drawn_.size());
  }
  engine_->upload(steady_.noise + image.row * steady_.row_bytes, drawn_.data(), steady_.row_bytes);
}

void Pool::turn(std::size_t first, std::size_t count, int reach) {
  const std::size_t bytes = count * steady_.row_bytes, offset = first * steady_.row_bytes;
  const auto copy = [&](std::byte* to, const std::byte* from) {
    if (to != nullptr && from != nullptr) {
      engine_->copy(to + offset, from + offset, bytes);
    }
  };
  for (auto lag = static_cast<std::size_t>(reach); lag > 0; --lag) {
    copy(steady_.latents[lag], steady_.latents[lag - 1]);
    copy(steady_.outputs[lag], steady_.outputs[lag - 1]);
  }
  copy(steady_.latents[0], steady_.next_latents);
}

Call& Pool::call(std::size_t graph, std::size_t first, std::size_t rows) {
  const std::uint64_t key = (static_cast<std::uint64_t>(graph) << 40) | (static_cast<std::uint64_t>(first) << 20) | rows;
  auto& made = calls_[key];
  if (made == nullptr) {
    const auto images = static_cast<std::int64_t>(rows);
    const auto fits = [&](const Shape* each) { return each->batch.least <= images && images <= each->batch.most; };
    const auto found = std::find_if(shapes_.begin(), shapes_.end(), fits);
    if (found == shapes_.end()) {
      throw Error(Code::request, "the bundle takes " + ranges_of(shapes_) + " images at once, got " + std::to_string(rows) +
                                     "; export with --batch");
    }
    const GraphSpec& spec = *tgate::find((*found)->graphs, graphs_[graph].name);
    std::vector<Bound> inputs, outputs;
    const auto bind = [&](const TensorSpec& tensor, std::vector<Bound>& bounds) {
      bounds.push_back({&tensor, buffer(tensor.name).at(first)});
    };
    for (const TensorSpec& tensor : spec.inputs) {
      bind(tensor, inputs);
    }
    for (const TensorSpec& tensor : spec.outputs) {
      const auto& writes = graphs_[graph].writes;
      const bool kept = std::find(writes.begin(), writes.end(), tensor.name) != writes.end();
      if (kept || tensor.name == "next_latents" || tensor.name == "output") {
        bind(tensor, outputs);
      }
    }
    made = session_->graph(spec).bind(inputs, outputs, images);
  }
  return *made;
}

}  // namespace tgate

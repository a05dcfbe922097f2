// One picture on its way: where it stands in the queue, what it looks like so far, its steps, and its end.

import { ask, eventsOf, Trouble, troubleOf } from "./api.js";

const PATH = "v1/images/generations";
const COLOURS = 8; // of page.css
const PATIENCE_MS = 2000; // until a request that was called off, and does not end, is hung up on

export class Drawing {
  /** A picture by `plan` (of /v1/models). `graphs`: all of the model's, by name, in the order of their colours.
   *  `about`: what is drawn, in words. `onStep` is called after each step. */
  constructor(plan, { graphs, about, size, fileName, onStep }) {
    this.plan = plan;
    this.spentMs = 0;
    this.through = null; // what the server tells of a finished drawing
    this.begun = false;
    this.over = false;
    this.cancelled = false;
    this.element = document.getElementById("drawing").content.firstElementChild.cloneNode(true);
    this.graphs = graphs;
    this.about = about;
    this.fileName = fileName;
    this.onStep = onStep;
    this.id = null;
    this.done = 0;
    this.total = Object.values(plan.steps).reduce((sum, count) => sum + count, 0);
    this.tallies = new Map(); // graph -> {count, ms, line}
    this.hangUp = new AbortController();

    this.at("h3").textContent = plan.name;
    this.at("progress").setAttribute("aria-label", `Steps of plan ${plan.name}`);
    this.at(".cancel").textContent = `Cancel plan ${plan.name}`;
    this.at(".cancel").addEventListener("click", () => this.cancel());
    this.at(".bars").setAttribute("aria-label", `Steps of plan ${plan.name}: none yet`);
    this.at("summary").textContent = `Steps of plan ${plan.name} as a table`;
    this.at(".scroll").setAttribute("aria-label", `Steps of plan ${plan.name}`);
    const [width, height] = size.split("x");
    this.at(".frame").style.aspectRatio = `${width} / ${height}`;
    this.at("img").width = width;
    this.at("img").height = height;
  }

  at(selector) {
    return this.element.querySelector(selector);
  }

  say(text) {
    this.at(".state").textContent = text;
  }

  /** How long all its steps will have taken, in ms, going by those that it has taken. */
  get expectedMs() {
    return this.over || !this.done ? this.spentMs : (this.spentMs * this.total) / this.done;
  }

  /** Draw; true once the picture is there, false where it was called off, before it began or since. Raises Trouble. */
  async draw(body) {
    if (this.over) return false;
    this.begun = true;
    this.say("Asks");
    try {
      const asked = {
        ...body,
        plan: this.plan.name,
        stream: true,
        stream_steps: true,
        partial_images: Math.min(3, this.total - 1),
      };
      const answer = await ask(PATH, { method: "POST", body: asked, signal: this.hangUp.signal });
      this.id = answer.headers.get("X-Request-Id");
      if (this.cancelled) this.callOff();
      for await (const event of eventsOf(answer)) this.heed(event);
      if (!this.through) throw new Trouble("the server hung up before the picture was through; draw again");
      return true;
    } catch (error) {
      if (!this.cancelled) throw error;
      return false;
    } finally {
      this.end();
    }
  }

  /** Have the server call it off; one that draws is over only once draw() returns. */
  cancel() {
    if (this.over || this.cancelled) return;
    this.cancelled = true;
    this.say("Being cancelled");
    if (!this.begun) this.end();
    else if (this.id) this.callOff();
    else this.hangUp.abort();
  }

  callOff() {
    ask(`${PATH}/${encodeURIComponent(this.id)}`, { method: "DELETE" }).catch(() => {}); // it may just have ended
    setTimeout(() => this.hangUp.abort(), PATIENCE_MS);
  }

  heed(event) {
    switch (event.type) {
      case "image_generation.queued":
        this.say(event.ahead ? `Waits behind ${images(event.ahead)}` : "About to start");
        break;
      case "image_generation.step":
        this.step(event);
        break;
      case "image_generation.partial_image":
        this.show(event, `${this.about}, plan ${this.plan.name}, still forming`);
        break;
      case "image_generation.completed":
        this.complete(event);
        break;
      case "error":
        throw troubleOf(event.error);
    }
  }

  step({ step, graph, done, total, company, elapsed_ms: ms }) {
    this.done = done;
    this.total = total;
    this.spentMs += ms;
    this.at("progress").max = total;
    this.at("progress").value = done;
    if (!this.cancelled) this.say(`Step ${done} of ${total}`);

    const bar = document.createElement("span");
    bar.className = this.colour(graph);
    bar.style.flexGrow = ms;
    bar.title = `step ${step + 1}: ${graph}, ${milliseconds(ms)}, ${company > 1 ? `${images(company)} in the call` : "alone in the call"}`;
    this.at(".bars").append(bar);

    const row = this.at("tbody").insertRow();
    for (const text of [step + 1, graph, milliseconds(ms), company]) row.insertCell().textContent = text;

    const tally = this.tally(graph);
    tally.count += 1;
    tally.ms += ms;
    tally.line.textContent = `${tally.count} × ${graph}, ${milliseconds(tally.ms)}`;
    this.onStep();
  }

  /** What is known of a graph so far, and its line in the legend. */
  tally(graph) {
    if (!this.tallies.has(graph)) {
      const item = document.createElement("li");
      const swatch = document.createElement("span");
      const line = document.createElement("span");
      swatch.className = `swatch ${this.colour(graph)}`;
      item.append(swatch, line);
      this.at(".legend").append(item);
      this.tallies.set(graph, { count: 0, ms: 0, line });
    }
    return this.tallies.get(graph);
  }

  colour(graph) {
    return `graph-${Math.max(0, this.graphs.indexOf(graph)) % COLOURS}`;
  }

  complete(event) {
    const told = event.tgate;
    this.through = told;
    this.show(event, `${this.about}, plan ${this.plan.name}`);
    this.at(".queue").textContent = seconds(told.queue_s);
    this.at(".draw").textContent = seconds(told.draw_s);
    this.at(".decode").textContent = seconds(told.decode_s);
    this.at(".company").textContent = told.company.toFixed(1);
    if (told.cut) {
      this.at(".cut").textContent = `Longer than the model reads; left unread: ${told.cut.join(" … ")}`;
      this.at(".cut").hidden = false;
    }
    const save = this.at(".save");
    save.href = this.at("img").src;
    save.download = this.fileName;
    save.textContent = `Save picture of plan ${this.plan.name}`;
    save.hidden = false;
  }

  /** Show a picture of an event; the one before is let go. */
  show(event, alt) {
    const image = this.at("img");
    const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
    const before = image.src;
    image.src = URL.createObjectURL(new Blob([bytes], { type: `image/${event.output_format}` }));
    image.alt = alt;
    image.hidden = false;
    if (before) URL.revokeObjectURL(before);
  }

  end() {
    this.over = true;
    const focused = document.activeElement === this.at(".cancel");
    this.at(".cancel").hidden = true;
    this.say(this.through ? `Done: ${this.done} steps` : this.cancelled ? "Cancelled" : "Failed");
    if (focused) (this.through ? this.at(".save") : this.at("h3")).focus(); // what had the focus is gone
    const tallies = [...this.tallies].map(([graph, { count, ms }]) => `${count} of ${graph} in ${milliseconds(ms)}`);
    this.at(".bars").setAttribute("aria-label", `Steps of plan ${this.plan.name}: ${tallies.join(", ") || "none"}`);
    this.onStep();
  }

  /** Let the picture go; the drawing is off the page. */
  forget() {
    const { src } = this.at("img");
    if (src) URL.revokeObjectURL(src);
  }
}

/** A time in words. */
export function seconds(time) {
  return time < 1 ? milliseconds(time * 1000) : `${time.toFixed(2)} s`;
}

function milliseconds(time) {
  return time < 10 ? `${time.toFixed(1)} ms` : time < 10_000 ? `${time.toFixed(0)} ms` : `${(time / 1000).toFixed(1)} s`;
}

function images(count) {
  return count === 1 ? "1 image" : `${count} images`;
}

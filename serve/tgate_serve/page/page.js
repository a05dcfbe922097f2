// The page: what is asked, of which model, and the drawings that come of it.

import { ask, Trouble, useKey } from "./api.js";
import { Drawing, seconds } from "./drawing.js";

const POLL_MS = 2000;
const SEED_LIMIT = Number.MAX_SAFE_INTEGER + 1; // beyond it, JavaScript's numbers are not whole any more

const at = (id) => document.getElementById(id);

let models = []; // those of /v1/models that this page can draw with
let drawings = []; // of the last run
let running = false;
let seedDrawn = null;

// --- what can be asked --------------------------------------------------------------------------

async function load() {
  try {
    const all = (await (await ask("v1/models")).json()).data;
    models = all.filter(({ tgate }) => tgate.makes === "pictures" && tgate.takes === "prompt" && !tgate.inpaints);
    const others = all.filter((model) => !models.includes(model)).map((model) => model.id);
    at("left-out").textContent = `Left out, as this page draws pictures of prompts: ${others.join(", ")}.`;
    at("left-out").hidden = !others.length;
    at("key-form").hidden = true;
    options(at("model"), models.map((model) => model.id));
    if (!models.length) tell("no model that draws pictures of prompts is served; start the server with one");
    else offer();
  } catch (error) {
    failed(error);
  }
}

function model() {
  return models.find((each) => each.id === at("model").value);
}

/** Offer what the model has. */
function offer() {
  const { tgate } = model();
  options(at("size"), tgate.sizes);
  options(at("plan"), tgate.plans.map((plan) => plan.name));
  at("negative-field").hidden = !tgate.negative_prompt;
  offerComparison();
}

/** Offer the other plans to compare with, the plan's own baselines first; "ungated" is meant where it is one. */
function offerComparison() {
  const { plans } = model().tgate;
  const chosen = plans.find((plan) => plan.name === at("plan").value);
  const others = plans.map((plan) => plan.name).filter((name) => name !== chosen.name);
  const baselines = chosen.baselines.filter((name) => others.includes(name));
  const choice = at("compare");
  options(choice, [...baselines, ...others.filter((name) => !baselines.includes(name))]);
  choice.prepend(new Option("nothing", ""));
  choice.value = baselines.includes("ungated") ? "ungated" : "";
}

/** Offer these in a select; what was chosen stays so where it is among them. */
function options(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) select.value = before;
}

// --- a run --------------------------------------------------------------------------------------

async function run() {
  if (running) return say("A drawing is under way; Escape cancels it.");
  if (!model()) return say("There is no model to draw with.");
  const seed = askedSeed();
  if (seed === null) return;
  begin(seed);
  const body = { prompt: at("prompt").value, model: model().id, size: at("size").value, seed };
  if (model().tgate.negative_prompt && at("negative").value) body.negative_prompt = at("negative").value;
  const atOnce = at("at-once").checked;
  const [first, second] = drawings;
  try {
    if (atOnce) await Promise.all(drawings.map((drawing) => draw(drawing, body)));
    else if ((await draw(first, body)) && second) await draw(second, body);
  } finally {
    running = false;
    at("draw").removeAttribute("aria-disabled");
    if (second && drawings.every((drawing) => drawing.through)) compare(atOnce);
  }
}

function begin(seed) {
  running = true;
  at("draw").setAttribute("aria-disabled", "true"); // and not disabled, which would take the focus away
  at("trouble").replaceChildren();
  say("");
  drawings.forEach((drawing) => drawing.forget());
  seedDrawn = seed;
  const prompt = at("prompt").value;
  const size = at("size").value;
  at("facts-text").textContent = `“${prompt}”, ${size}, seed ${seed}.`;
  at("facts").hidden = false;
  const { plans } = model().tgate;
  const chosen = [at("plan").value, at("compare").value].map((name) => plans.find((plan) => plan.name === name));
  drawings = chosen
    .filter(Boolean)
    .map((plan) => new Drawing(plan, {
      graphs: [...new Set(plans.flatMap((each) => Object.keys(each.steps)))],
      about: `“${short(prompt)}”`,
      size,
      fileName: `${[prompt, String(seed), plan.name].map(plain).filter(Boolean).join("-")}.png`,
      onStep: scale,
    }));
  at("drawings").replaceChildren(...drawings.map((drawing) => drawing.element));
  drawings[1]?.say(at("at-once").checked ? "" : `Waits for plan ${drawings[0].plan.name}`);
}

/** One drawing from its start to its end; whether the run goes on. */
async function draw(drawing, body) {
  const { name } = drawing.plan;
  if (!drawing.cancelled) say(`Drawing with plan ${name}.`);
  try {
    const there = await drawing.draw(body);
    say(there ? `Plan ${name} is done: drawn in ${seconds(drawing.through.draw_s)}.` : `Plan ${name} was cancelled.`);
    return true;
  } catch (error) {
    failed(error);
    drawings.forEach((other) => other.cancel());
    return false;
  }
}

/** The seed of the field, or a random one; null where it is none, which the field then says. */
function askedSeed() {
  const field = at("seed");
  const text = field.value.trim();
  if (!text) {
    const [high, low] = crypto.getRandomValues(new Uint32Array(2));
    return (high % 2 ** 21) * 2 ** 32 + low;
  }
  const seed = /^[0-9]+$/.test(text) ? Number(text) : NaN;
  if (seed < SEED_LIMIT) return seed;
  field.setCustomValidity(`a seed of this page is a whole number from 0 to ${SEED_LIMIT - 1}`);
  field.reportValidity();
  return null;
}

/** Bars are as long as the time that they stand for, on one scale for all drawings. */
function scale() {
  const longest = Math.max(...drawings.map((drawing) => drawing.expectedMs), 1e-9);
  for (const drawing of drawings) drawing.at(".bars").style.width = `${(100 * drawing.spentMs) / longest}%`;
}

function compare(atOnce) {
  const [first, second] = drawings;
  const [a, b] = drawings.map((drawing) => drawing.through.draw_s);
  const shared = atOnce ? "; drawn at once, so each has waited for the other" : "";
  say(
    `From one seed, plan ${first.plan.name} was drawn in ${seconds(a)} and plan ${second.plan.name} in ${seconds(b)}, ` +
      `${(b / a).toFixed(2)} times as long${shared}.`,
  );
}

/** Enough of a prompt to know it by. */
function short(prompt) {
  const characters = [...prompt];
  return characters.length > 80 ? `${characters.slice(0, 79).join("")}…` : prompt;
}

/** Part of a file's name: letters and digits of any script. */
function plain(text) {
  const words = text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return [...words.join("-")].slice(0, 60).join("").replace(/-$/, "");
}

// --- what is said -------------------------------------------------------------------------------

/** For everybody, screen readers too; so at a drawing's beginning and end alone. */
function say(text) {
  at("news").textContent = text;
}

function failed(error) {
  if (!(error instanceof Trouble)) {
    tell(`the page failed: ${error.message}`);
    throw error;
  }
  tell(error.message);
  if (error.status === 401) {
    at("key-form").hidden = false;
    at("key").focus();
  }
}

function tell(message) {
  const said = [...at("trouble").children].map((child) => child.textContent);
  if (said.includes(message)) return;
  const line = document.createElement("p");
  line.textContent = message;
  at("trouble").append(line);
}

/** How busy the model is, every two seconds while somebody looks. */
async function poll() {
  let text = "The server does not answer.";
  try {
    const answer = await fetch("health", { cache: "no-store" });
    const health = await answer.json();
    const load = health.models[at("model").value];
    if (health.status === "failed") text = "The server has failed, and has to be started again.";
    else if (health.status !== "ok") text = `The server is ${health.status}.`;
    else text = load ? `${at("model").value}: ${load.running} running, ${load.waiting} waiting` : "";
  } catch {
    // said already
  }
  if (at("load").textContent !== text) at("load").textContent = text;
}

function keepPolling() {
  if (document.visibilityState === "visible") poll();
}

// --- wiring -------------------------------------------------------------------------------------

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  at("trouble").replaceChildren();
  load().then(() => at("key-form").hidden && at("prompt").focus());
});
at("model").addEventListener("change", () => {
  offer();
  keepPolling();
});
at("plan").addEventListener("change", offerComparison);
at("seed").addEventListener("input", () => at("seed").setCustomValidity(""));
at("keep-seed").addEventListener("click", () => {
  at("seed").value = seedDrawn;
  at("seed").setCustomValidity("");
});
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape") drawings.forEach((drawing) => drawing.cancel());
  if (event.key === "Enter" && event.ctrlKey && at("form").contains(event.target)) at("form").requestSubmit();
});
document.addEventListener("visibilitychange", keepPolling);
setInterval(keepPolling, POLL_MS);
await load();
keepPolling();

// The panel behind the sliders: models, sampling, system prompt, looks. What the server does not tell of is not shown;
// a field that is left empty leaves the choice to the server.

import { setKey } from "./api.js";
import { el } from "./dom.js";
import { recall, remember } from "./store.js";

const SAVED = "nanochat.settings";
const MAX_TOP_TOKENS = 5; // shown for each place
const byId = (id) => document.getElementById(id);

// Sampling: names as in requests, each offered if the server tells its greatest value, as max_NAME. off: what it is
// where nobody says. command: the slash command.
export const NUMBERS = [
  { name: "temperature", label: "Temperature", command: "temperature", about: "0: the likeliest token" },
  { name: "top_p", label: "Top-p", command: "topp", off: 1, about: "1: off" },
  { name: "top_k", label: "Top-k", command: "topk", isWhole: true, about: "0: off" },
  { name: "min_p", label: "Min-p", command: "minp", off: 0, about: "0: off" },
  { name: "repetition_penalty", label: "Repetition penalty", command: "penalty", min: 1, off: 1, about: "1: off" },
  { name: "max_tokens", label: "Longest answer", command: "tokens", min: 1, isWhole: true, about: "in tokens" },
  { name: "seed", label: "Seed", command: "seed", max: 2 ** 31 - 1, isWhole: true, about: "empty: another each time" },
];

export class Settings {
  #values = recall(SAVED, {});
  #models = []; // as the server tells them
  #onChange;

  // onChange(name): something was set.
  constructor(onChange) {
    this.#onChange = onChange;
    if (typeof this.#values !== "object" || Array.isArray(this.#values)) this.#values = {};
    for (const setting of NUMBERS) this.#addNumber(setting);
    byId("system").addEventListener("input", (event) => this.set("system", event.target.value));
    byId("stop-strings").addEventListener("input", (event) => this.set("stop", event.target.value));
    for (const id of ["model", "second"]) {
      byId(id).addEventListener("change", (event) => this.set(id, event.target.value));
    }
    byId("show-tokens").addEventListener("change", (event) => this.set("show_tokens", event.target.checked));
    byId("key").addEventListener("change", (event) => {
      setKey(event.target.value.trim());
      this.#onChange("key");
    });
    for (const choice of document.querySelectorAll("[name=theme]")) {
      choice.addEventListener("change", () => this.set("theme", choice.value));
    }
    byId("reset").addEventListener("click", () => this.#reset());
    this.#show();
  }

  get(name) {
    return this.#values[name];
  }

  set(name, value) {
    if (value === "" || value === false) delete this.#values[name];
    else this.#values[name] = value;
    remember(SAVED, this.#values);
    this.#show();
    this.#onChange(name);
  }

  // The server's models have become known.
  offer(models) {
    this.#models = models;
    for (const [id, more] of [["model", []], ["second", [el("option", { value: "" }, "nobody")]]]) {
      byId(id).replaceChildren(...more, ...models.map((model) => el("option", { value: model.id }, model.id)));
    }
    this.#show();
  }

  // The models to ask: one, or two to compare. Empty while the server is unknown: then it chooses.
  get models() {
    const find = (id) => this.#models.find((model) => model.id === id);
    const first = find(this.get("model")) ?? this.#models[0];
    const second = this.#models.length > 1 ? find(this.get("second")) : undefined;
    return [first, second].filter((model, i) => model && (i === 0 || model !== first));
  }

  get limits() {
    return this.models[0]?.limits ?? {};
  }

  get showsTokens() {
    return Boolean(this.get("show_tokens"));
  }

  // What a request says beside model, messages and seed.
  requestFields() {
    const set = NUMBERS.filter(({ name }) => name !== "seed" && this.offers(name) && this.get(name) !== undefined);
    const stops = this.offers("stop") ? (this.get("stop") ?? "").split("\n").filter(Boolean) : [];
    const num = Math.min(MAX_TOP_TOKENS, this.limits.max_top_logprobs);
    return {
      ...Object.fromEntries(set.map(({ name }) => [name, this.get(name)])),
      ...(stops.length && { stop: stops }),
      ...(this.showsTokens && this.offers("logprobs") && { logprobs: true, top_logprobs: num }),
    };
  }

  // Sets a number from words; returns what is wrong with it, or "".
  setNumber(setting, text) {
    const { name, label, min, max, isWhole } = this.#bounds(setting);
    const value = text.trim() === "" ? NaN : Number(text);
    if (text.trim() !== "" && !(value >= min && value <= max && (!isWhole || Number.isInteger(value)))) {
      return `${label} is ${isWhole ? "a whole number" : "a number"} from ${min} to ${max}.`;
    }
    this.set(name, Number.isNaN(value) ? "" : value);
    return "";
  }

  // What a number is now, in words.
  describe({ name, label }) {
    return `${label}: ${this.get(name) ?? this.#default(name) ?? "the server's choice"}.`;
  }

  #default(name) {
    return this.models[0]?.defaults[name] ?? NUMBERS.find((setting) => setting.name === name).off;
  }

  // Whether the server has this setting. A seed it always has.
  offers(name) {
    const limit = { max_tokens: "max_tokens", logprobs: "max_top_logprobs" }[name] ?? `max_${name}`;
    return name === "seed" || limit in this.limits;
  }

  #bounds(setting) {
    const max = setting.max ?? this.limits[setting.name === "max_tokens" ? "max_tokens" : `max_${setting.name}`];
    return { min: 0, isWhole: false, ...setting, max: max ?? Infinity };
  }

  #addNumber(setting) {
    const id = `set-${setting.name}`;
    const kind = { type: "number", inputmode: "decimal", step: setting.isWhole ? 1 : 0.05 };
    const input = el("input", { id, ...kind, "aria-describedby": `${id}-about` });
    const about = el("small", { id: `${id}-about` }, setting.about);
    input.addEventListener("change", () => {
      const wrong = input.validity.badInput ? "Write a number, or nothing." : this.setNumber(setting, input.value);
      about.textContent = wrong || setting.about;
      input.setAttribute("aria-invalid", String(Boolean(wrong)));
    });
    const label = el("label", { for: id }, setting.label);
    byId("numbers").append(el("div", { class: "field", id: `${id}-field` }, label, input, about));
  }

  #reset() {
    for (const { name } of NUMBERS) delete this.#values[name];
    this.set("stop", "");
  }

  #show() {
    const { theme, system = "", stop = "" } = this.#values;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    for (const choice of document.querySelectorAll("[name=theme]")) choice.checked = choice.value === (theme ?? "");
    for (const setting of NUMBERS) this.#showNumber(setting);
    show(byId("system"), system);
    show(byId("stop-strings"), stop);
    byId("stop-field").hidden = !this.offers("stop");
    byId("tokens-field").hidden = !this.offers("logprobs");
    byId("show-tokens").checked = this.showsTokens;
    byId("models-field").hidden = this.#models.length < 2;
    byId("model").value = this.models[0]?.id ?? "";
    byId("second").value = this.models[1]?.id ?? "";
  }

  #showNumber(setting) {
    const { name } = setting;
    const input = byId(`set-${name}`);
    byId(`set-${name}-field`).hidden = !this.offers(name);
    input.placeholder = String(this.#default(name) ?? "");
    if (document.activeElement !== input) input.value = this.get(name) ?? "";
  }
}

// Not while someone writes there: the caret would jump.
function show(field, text) {
  if (field.value !== text) field.value = text;
}

// Conversations on this computer, in the browser's localStorage, one entry each:
//
//     {id, title, system, created, updated, exchanges: [{question, answers: [answer, ...]}]}
//     answer: {model, seed, parts: [{type, text, tokens?}], note, context_used?, tokens_per_s?}
//
// localStorage and not IndexedDB because it writes at once: what is saved before it is shown cannot be lost by a
// reload. It has room for about five million characters, which is more than a hundred of the longest conversations.
//
// What comes from outside (an imported file, an entry that something else wrote) is built anew, field by field.

const PREFIX = "nanochat.conversation.";
const FORMAT = "nanochat-conversations";
const PART_TYPES = ["text", "python", "python_output"];
const MAX_TITLE = 200;
const MAX_IMPORT_BYTES = 20_000_000;

// Reads a setting or the like; whatever is not there or not readable is `otherwise`. area: "sessionStorage" for what
// belongs to this window.
export function recall(name, otherwise, area = "localStorage") {
  try {
    return JSON.parse(window[area].getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// False where there is no room, or no storage at all.
export function remember(name, value, area = "localStorage") {
  try {
    window[area].setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export class Store {
  #conversations = new Map();

  // changed(id): another window saved or deleted one.
  constructor(changed) {
    try {
      for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) this.#read(key);
    } catch {
      // no storage: conversations live as long as this window
    }
    addEventListener("storage", ({ key }) => {
      if (!key?.startsWith(PREFIX)) return;
      this.#read(key);
      changed(key.slice(PREFIX.length));
    });
  }

  #read(key) {
    const found = checked(recall(key, null));
    const id = key.slice(PREFIX.length);
    if (found) this.#conversations.set(id, { ...found, id });
    else this.#conversations.delete(id);
  }

  get(id) {
    return this.#conversations.get(id);
  }

  // All that contain every word of the query, in the title or in what was said; the latest first.
  find(query = "") {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [...this.#conversations.values()].filter((one) => {
      const text = words.length ? everything(one).toLowerCase() : "";
      return words.every((word) => text.includes(word));
    });
    return found.sort((one, other) => other.updated - one.updated);
  }

  // Returns false if it could not be written; it is kept in this window all the same.
  save(conversation) {
    conversation.updated = Date.now();
    this.#conversations.set(conversation.id, conversation);
    return remember(PREFIX + conversation.id, conversation);
  }

  remove(conversation) {
    this.#conversations.delete(conversation.id);
    try {
      localStorage.removeItem(PREFIX + conversation.id);
    } catch {
      // no storage
    }
  }

  // Adds the conversations of a file's text; returns {added, known, isFull}. Throws an Error that is a sentence.
  import(text) {
    const conversations = parseFile(text);
    const fresh = conversations.filter((one) => !this.#conversations.has(one.id));
    const saved = fresh.map((one) => {
      this.#conversations.set(one.id, one);
      return remember(PREFIX + one.id, one);
    });
    return { added: fresh.length, known: conversations.length - fresh.length, isFull: saved.includes(false) };
  }
}

export function newConversation(system) {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, updated: now, exchanges: [] };
}

export function titleOf(conversation) {
  const first = conversation.exchanges[0]?.question.trim().split("\n")[0] ?? "";
  return conversation.title || (first.length > 60 ? `${first.slice(0, 59)}…` : first) || "New chat";
}

export function fileOf(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

export function textOf(parts) {
  return parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

// A piece of what was said around the query's first word, for the list of what was found.
export function excerpt(conversation, query) {
  const text = everything({ ...conversation, title: "" });
  const at = text.toLowerCase().indexOf(query.toLowerCase().split(/\s+/).find(Boolean) ?? "");
  const start = text.lastIndexOf(" ", at - 15) + 1;
  return at < 0 ? "" : (start ? "…" : "") + text.slice(start, at + 60).trim();
}

function everything({ title, exchanges }) {
  const said = exchanges.flatMap(({ question, answers }) => [question, ...answers.map(({ parts }) => textOf(parts))]);
  return [title, ...said].join("\n");
}

function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function parseFile(text) {
  if (text.length > MAX_IMPORT_BYTES) throw new Error("The file is too large: 20 MB is the most.");
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; choose one that was exported here.");
  }
  const found = file?.format === FORMAT && Array.isArray(file.conversations) ? file.conversations.map(checked) : [];
  if (found.length && !found.includes(null)) return found;
  throw new Error("The file holds no conversations of this page; choose one that was exported here.");
}

// The conversation with the fields we know and nothing else, or null if it is none.
function checked(one) {
  if (!Array.isArray(one?.exchanges)) return null;
  const exchanges = one.exchanges.map(checkedExchange);
  if (exchanges.includes(null)) return null;
  const id = /^[0-9a-f]{24}$/.test(one.id) ? one.id : newId();
  const title = string(one.title).slice(0, MAX_TITLE);
  const [created, updated] = [number(one.created) ?? 0, number(one.updated) ?? 0];
  return { id, title, system: string(one.system), created, updated, exchanges };
}

function checkedExchange(exchange) {
  if (typeof exchange?.question !== "string" || !Array.isArray(exchange.answers)) return null;
  const answers = exchange.answers.map(checkedAnswer);
  return answers.includes(null) || !answers.length ? null : { question: exchange.question, answers };
}

function checkedAnswer(answer) {
  if (!Array.isArray(answer?.parts)) return null;
  const parts = answer.parts.map(checkedPart);
  if (parts.includes(null)) return null;
  const { context_used, tokens_per_s, seed } = answer;
  return {
    model: string(answer.model), seed: number(seed), parts, note: string(answer.note),
    context_used: number(context_used), tokens_per_s: number(tokens_per_s),
  };
}

function checkedPart(part) {
  if (!PART_TYPES.includes(part?.type) || typeof part.text !== "string") return null;
  const found = Array.isArray(part.tokens) ? part.tokens.filter(isToken) : [];
  const tokens = found.map(([text, logprob, top, isForced]) => [text, logprob, top, Boolean(isForced)]);
  return { type: part.type, text: part.text, ...(tokens.length && { tokens }) };
}

// [text, logprob or null, [[text, logprob], ...], isForced]
function isToken(token) {
  const [text, logprob, top] = Array.isArray(token) ? token : [];
  const isPair = (pair) => Array.isArray(pair) && typeof pair[0] === "string" && typeof pair[1] === "number";
  const isKnown = logprob === null || typeof logprob === "number";
  return typeof text === "string" && isKnown && Array.isArray(top) && top.every(isPair);
}

function string(value) {
  return typeof value === "string" ? value : "";
}

function number(value) {
  return Number.isFinite(value) ? value : undefined;
}

// The server's interface, and its errors in words.

import { readEvents } from "./sse.js";
import { recall, remember } from "./store.js";

const KEY = "nanochat.key"; // for servers that ask for one; forgotten with the window

// Something went wrong that the reader should know; the message is a sentence. kind: "offline", "busy", "full" (the
// context), "key", or "" for all others.
export class ChatError extends Error {
  constructor(message, kind = "") {
    super(message);
    this.kind = kind;
  }
}

// What the server serves: [{id, context_tokens, defaults, limits}], the first being its own choice.
export async function fetchModels(signal) {
  const { data } = await (await ask("/v1/models", { signal })).json();
  return data.map(({ id, nanochat = {} }) => ({ id, defaults: {}, limits: {}, ...nanochat }));
}

// The code's [kind, text] pairs, or null where there are none for it.
export async function fetchHighlight(language, code) {
  try {
    const response = await ask("/highlight", { method: "POST", body: JSON.stringify({ language, code }) });
    return (await response.json()).tokens;
  } catch {
    return null;
  }
}

// The pieces of an answer as they come: {index, type, text, tokens?}, and in the end {finish, context_used?,
// tokens_per_s?}. Throws ChatError; an abort through `signal` throws whatever fetch throws.
export async function* streamAnswer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true });
  const response = await ask("/v1/chat/completions", { method: "POST", body, signal });
  let finish;
  try {
    for await (const data of readEvents(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new ChatError(sentence(event.error.message), kindOf(event.error, 500));
      const choice = event.choices[0];
      if (typeof choice?.nanochat?.text === "string") yield choice.nanochat;
      if (choice?.finish_reason) finish = { finish: choice.finish_reason, ...measures(choice.nanochat) };
    }
  } catch (error) {
    if (error instanceof ChatError || signal.aborted) throw error;
    throw new ChatError("The connection broke off in the middle of the answer. Is the server running?", "offline");
  }
  if (!finish) throw new ChatError("The answer ended too early. Is the server running?", "offline");
  yield finish;
}

function measures({ context_used, tokens_per_s } = {}) {
  return { context_used, tokens_per_s };
}

export function setKey(key) {
  remember(KEY, key, "sessionStorage");
}

async function ask(path, { signal, ...options }) {
  const key = recall(KEY, "", "sessionStorage");
  const headers = {
    ...(options.body && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
  };
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ChatError("The server cannot be reached. Is it running?", "offline");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // no JSON: something between us and the server spoke
  }
  const kind = kindOf(error, response.status);
  const known = {
    busy: `The model is busy with other conversations. Try again in ${seconds(response)}.`,
    key: "This server asks for a key.",
  };
  const told = typeof error.message === "string" ? sentence(error.message) : "";
  return new ChatError(known[kind] || told || `The server answered with an error (${response.status}).`, kind);
}

function kindOf(error, status) {
  if (error.code === "context_length_exceeded") return "full";
  return { 401: "key", 403: "key", 429: "busy" }[status] ?? "";
}

function seconds(response) {
  const told = response.headers.get("Retry-After");
  return told === "1" ? "a second" : `${/^\d+$/.test(told ?? "") ? told : "a few"} seconds`;
}

function sentence(text) {
  const end = /[.!?…]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}

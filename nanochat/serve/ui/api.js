// The server's interface, and its errors in words.

import { readEvents } from "./sse.js";

// Something went wrong that the reader should know; the message is a sentence.
export class ChatError extends Error {}

// What the server allows, for trimming long conversations; null while it cannot be reached.
export async function fetchLimits(signal) {
  try {
    const response = await fetch("/v1/models", { signal });
    return (await response.json()).data[0].nanochat.limits;
  } catch {
    return null;
  }
}

// The pieces of an answer, {index, type, text}, as they come, then {finish: reason}. Throws ChatError; an abort through
// `signal` throws whatever fetch throws.
export async function* streamAnswer(messages, signal) {
  const response = await ask(messages, signal);
  try {
    for await (const data of readEvents(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ChatError(sentence(event.error.message));
      const choice = event.choices[0];
      if (choice?.nanochat) yield choice.nanochat;
      if (choice?.finish_reason) yield { finish: choice.finish_reason };
    }
  } catch (error) {
    if (error instanceof ChatError || signal.aborted) throw error;
    throw new ChatError("The connection broke off in the middle of the answer. Is the server still running?");
  }
  throw new ChatError("The answer ended too early. Is the server still running?");
}

async function ask(messages, signal) {
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages, stream: true }),
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ChatError("The server cannot be reached. Is it still running? Your message is kept below.");
  }
  if (!response.ok) throw new ChatError(await describe(response));
  return response;
}

async function describe(response) {
  if (response.status === 429) {
    const seconds = response.headers.get("Retry-After");
    const wait = seconds === "1" ? "a second" : `${seconds ?? "a few"} seconds`;
    return `The model is busy with other conversations. Please try again in ${wait}; your message is kept below.`;
  }
  try {
    return sentence((await response.json()).error.message);
  } catch {
    return `The server answered with an error (${response.status}). Please try again.`;
  }
}

function sentence(text) {
  const end = /[.!?…]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}

// One answer: what is sent for it, and how it is written down as it comes.

import { ChatError, streamAnswer } from "./api.js";
import { packed } from "./tokens.js";

const PAINT_EVERY_MS = 33;

// Messages for the server, in the words of the column that goes on; the oldest exchanges are left out where it allows
// no more. Returns {messages, numLeft}: how many were left out.
export function messagesFor(system, exchanges, text, column, limits) {
  const { max_total_chars = Infinity, max_messages = Infinity } = limits;
  const said = exchanges.map(({ question, answers }) => ({ question, parts: partsOf(answers[column] ?? answers[0]) }));
  const answered = said.filter(({ parts }) => parts.length);
  const opening = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  let room = max_total_chars - text.length - system.length;
  const fitting = [];
  for (const exchange of answered.toReversed()) {
    room -= exchange.parts.reduce((sum, part) => sum + part.text.length, exchange.question.length);
    if (room < 0 || 2 * fitting.length + 4 > max_messages) break;
    fitting.unshift(exchange);
  }
  const messages = fitting.flatMap((exchange) => [
    { role: "user", content: exchange.question },
    { role: "assistant", content: exchange.parts },
  ]);
  messages.push({ role: "user", content: text });
  return { messages: [...opening, ...messages], numLeft: answered.length - fitting.length };
}

function partsOf(answer) {
  return answer.parts.map(({ type, text }) => ({ type, text }));
}

// Write one answer down as it comes; returns the error that ended it, or null.
export async function write(one, request, signal, paint) {
  let note = "";
  let failure = null;
  try {
    for await (const piece of streamAnswer(request, signal)) {
      if (signal.aborted) break;
      if (piece.finish) {
        note = piece.finish === "length" ? "length" : "";
        Object.assign(one, { context_used: piece.context_used, tokens_per_s: piece.tokens_per_s });
      } else {
        addPiece(one.parts, piece);
        paint();
      }
    }
  } catch (error) {
    if (!signal.aborted) {
      if (!(error instanceof ChatError)) console.error(error);
      failure = error instanceof ChatError ? error : new ChatError("The page made a mistake. Please try again.");
      note = "broken";
    }
  }
  if (signal.aborted) note = "stopped";
  one.note = note || (one.parts.length ? "" : "empty");
  return failure;
}

function addPiece(parts, { index, type, text, tokens }) {
  while (parts.length <= index) parts.push({ type, text: "", ...(tokens && { tokens: [] }) });
  parts[index].text += text;
  if (tokens) parts[index].tokens?.push(...tokens.map(packed));
}

// Calls `act` at once, or when PAINT_EVERY_MS have passed since the last time. A timer and no animation frame: those
// stand still in a window that nobody sees.
export function throttled(act) {
  let last = -Infinity;
  let timer = null;
  const now = () => {
    clearTimeout(timer);
    timer = null;
    last = performance.now();
    act();
  };
  const call = () => {
    timer ??= setTimeout(now, Math.max(0, last + PAINT_EVERY_MS - performance.now()));
  };
  return Object.assign(call, { now });
}

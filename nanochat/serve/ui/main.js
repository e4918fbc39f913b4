// The chat: what has been said, and what happens when someone types, sends, stops or starts anew.

import { ChatError, fetchLimits, streamAnswer } from "./api.js";
import { AnswerView, announce, clearMessages, scroller, showError, showQuestion } from "./view.js";

const composer = document.getElementById("composer");
const question = document.getElementById("question");
const sendButton = document.getElementById("send");
const stopButton = document.getElementById("stop");

let exchanges = []; // {question, parts}, answered ones only
let running = null; // the AbortController of the answer that is being written
let limits = null; // asked for with the first question, and with the next one where that failed

// Messages for the server: as many of the last exchanges as it allows, then the new question.
function conversation(text) {
  const length = (exchange) => exchange.parts.reduce((sum, part) => sum + part.text.length, exchange.question.length);
  let room = (limits?.max_total_chars ?? Infinity) - text.length;
  const fitting = [];
  for (const exchange of exchanges.toReversed()) {
    room -= length(exchange);
    if (room < 0 || 2 * fitting.length + 3 > (limits?.max_messages ?? Infinity)) break;
    fitting.unshift(exchange);
  }
  const earlier = fitting.flatMap((exchange) => [
    { role: "user", content: exchange.question },
    { role: "assistant", content: exchange.parts },
  ]);
  return [...earlier, { role: "user", content: text }];
}

async function send(text) {
  if (running) return;
  const mine = new AbortController();
  const parts = [];
  showError("");
  const takeBack = showQuestion(text);
  const view = new AnswerView();
  setRunning(mine);
  announce("The answer is being written.");
  let note = "";
  try {
    limits ??= await fetchLimits(mine.signal);
    for await (const piece of streamAnswer(conversation(text), mine.signal)) {
      if (mine.signal.aborted) break;
      if (piece.finish) {
        note = piece.finish === "length" ? "The answer was cut off: it reached its longest allowed length." : "";
      } else {
        parts[piece.index] ??= { type: piece.type, text: "" };
        parts[piece.index].text += piece.text;
        view.add(piece);
      }
    }
  } catch (error) {
    if (!mine.signal.aborted) {
      if (!(error instanceof ChatError)) console.error(error);
      showError(error instanceof ChatError ? error.message : "The page made a mistake. Please try again.");
      note = "The answer broke off here.";
    }
  }
  if (running !== mine) return; // a new chat has begun: nothing of this one is left
  setRunning(null);
  if (mine.signal.aborted) note = "Stopped.";
  settle(text, parts, view, note, takeBack);
}

// An answer is over. One without a single word is taken back, and its question put into the box again.
function settle(text, parts, view, note, takeBack) {
  const failed = note !== "" && parts.length === 0;
  if (failed) {
    view.remove();
    takeBack();
    question.value = question.value ? `${text}\n${question.value}` : text;
    question.focus();
  } else {
    exchanges.push({ question: text, parts });
    view.end(parts.length ? note : "The model had nothing to say.");
  }
  refresh();
  const spoken = parts.filter((part) => part.type === "text").map((part) => part.text).join(" ");
  announce(failed ? "" : `nanochat: ${spoken} ${note}`);
}

function setRunning(controller) {
  const wasElsewhere = document.activeElement !== question;
  running = controller;
  stopButton.hidden = !controller;
  sendButton.hidden = Boolean(controller);
  refresh();
  if (wasElsewhere) restFocus();
}

// Where the keyboard goes when its button has gone. On a touch screen the box would call up the keyboard.
function restFocus() {
  (matchMedia("(hover: none)").matches ? scroller : question).focus({ preventScroll: true });
}

// The box is as high as its text, and only text can be sent.
function refresh() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  sendButton.disabled = !question.value.trim();
}

function stop() {
  running?.abort();
}

function startAnew() {
  const old = running;
  setRunning(null);
  old?.abort();
  exchanges = [];
  clearMessages();
  showError("");
  announce("New chat.");
  question.focus();
}

// Send what stands in the box.
function submit() {
  const text = question.value;
  if (running || !text.trim()) return;
  question.value = "";
  send(text);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("input", refresh);
question.addEventListener("keydown", (event) => {
  // isComposing: Enter that picks a word of an input method is no Enter.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
stopButton.addEventListener("click", stop);
document.getElementById("new-chat").addEventListener("click", startAnew);
document.getElementById("error").querySelector("button").addEventListener("click", () => {
  showError("");
  question.focus();
});
for (const button of document.getElementById("suggestions").children) {
  button.addEventListener("click", () => send(button.textContent));
}

refresh();

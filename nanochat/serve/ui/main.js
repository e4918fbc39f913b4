// The chat: what happens when someone types, sends, stops, edits, or opens another conversation.
//
// What is on screen has been saved before it was painted, so a reload in the middle of an answer loses nothing that was
// shown. An answer belongs to its conversation, not to the screen: whoever goes elsewhere stops it and keeps what is
// there.

import { ChatError, fetchModels } from "./api.js";
import { messagesFor, throttled, write } from "./asking.js";
import { runCommand } from "./commands.js";
import { announce, el, restFocus } from "./dom.js";
import { ExchangeView, NOTES, keepAtEnd, toEnd } from "./messages.js";
import * as notices from "./notices.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store, newConversation, recall, remember, textOf, titleOf } from "./store.js";

const CURRENT = "nanochat.current"; // this window's conversation, in the session's storage
const ASK_AGAIN_MS = 3000; // a server that could not be reached
const NEARLY_FULL = 0.9; // of the context

const byId = (id) => document.getElementById(id);
const question = byId("question");
const log = byId("log");

const settings = new Settings(changeSetting);
const store = new Store(changedElsewhere);
const sidebar = new Sidebar(store, { open, create: startAnew, remove, rename, import: importText });

let conversation = store.get(recall(CURRENT, "", "sessionStorage")) ?? newConversation(settings.get("system") ?? "");
let views = []; // of the conversation's exchanges, in order
let running = null; // the AbortController of the answers that are being written
let retry = submit; // what the button `Try again` does
const removed = new WeakSet(); // conversations that were deleted, whatever is still being written in them
let isKnown = false; // whether the server has told its models
let nextGreeting = null; // the timer of the next try to reach it

// Asking ----------------------------------------------------------------------------------------------------------

// Ask the question of the last exchange. undo(): as it was before, if not a single word comes.
async function answer(exchange, undo) {
  const mine = new AbortController();
  const asked = conversation;
  const seed = settings.get("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  const earlier = asked.exchanges.slice(0, -1);
  const view = show(exchange);
  notices.showError("");
  setRunning(mine);
  announce("The answer is being written.");
  if (!isKnown) await greet(mine.signal);
  const models = settings.models.length ? settings.models.map(({ id }) => id) : [undefined];
  exchange.answers = models.map((model) => ({ model: model ?? "", seed, parts: [], note: "left" }));
  view.showAnswers();
  toEnd();
  const paint = throttled(() => {
    save(asked);
    keepAtEnd(() => view.answers.forEach((one) => one.paint(one.answer.note === "left")));
  });
  paint.now();
  sidebar.show(conversation);
  const errors = await Promise.all(exchange.answers.map(async (one, column) => {
    const { messages, numLeft } = messagesFor(asked.system, earlier, exchange.question, column, settings.limits);
    one.numLeft = numLeft;
    const request = { model: models[column], messages, seed, ...settings.requestFields() };
    const error = await write(one, request, mine.signal, paint);
    paint();
    return error;
  }));
  paint.now();
  if (running === mine) setRunning(null);
  settle(asked, exchange, errors.find(Boolean), undo);
}

// All answers are over. If they have not a single word and that was no model's choice, it is as before.
function settle(asked, exchange, failure, undo) {
  const isEmpty = exchange.answers.every((one) => !one.parts.length && ["stopped", "broken"].includes(one.note));
  if (failure) report(failure);
  if (isEmpty) undo();
  save(asked);
  if (asked === conversation) showMeter();
  sidebar.show(conversation);
  const { parts, note } = exchange.answers[0];
  announce(isEmpty ? "" : `nanochat: ${textOf(parts)} ${NOTES[note]}`);
}

function stop() {
  running?.abort();
}

// What people do ----------------------------------------------------------------------------------------------------

// Send what stands in the box.
function submit() {
  const text = question.value;
  if (running || !text.trim()) return;
  question.value = "";
  const reply = text.startsWith("/") ? runCommand(text, settings, { clear: startAnew }) : null;
  if (reply === null) send(text);
  else if (reply) showRemark(reply);
  refresh();
}

function send(text) {
  if (running) return;
  const asked = conversation;
  const exchange = { question: text, answers: [] };
  asked.exchanges.push(exchange);
  answer(exchange, () => {
    asked.exchanges.pop();
    if (asked !== conversation) return;
    showConversation();
    question.value = question.value ? `${text}\n${question.value}` : text;
    retry = submit;
    refresh();
    question.focus();
  });
}

// The question is asked in other words; what came after it is forgotten.
function edit(exchange, text) {
  ask(exchange, { question: text, answers: [] }, (view) => {
    retry = () => edit(exchange, text);
    view.edit(text);
  });
}

function regenerate(exchange) {
  ask(exchange, { question: exchange.question, answers: [] }, () => {
    retry = () => regenerate(exchange);
    restFocus();
  });
}

// Put `fresh` in the place of `old` and all that follows. failed(view of old): nothing came, and all is as it was.
function ask(old, fresh, failed) {
  if (running) return;
  const asked = conversation;
  const before = [...asked.exchanges];
  asked.exchanges.splice(before.indexOf(old), Infinity);
  showConversation();
  asked.exchanges.push(fresh);
  restFocus();
  answer(fresh, () => {
    asked.exchanges = before;
    if (asked !== conversation) return;
    showConversation();
    failed(views.find((view) => view.exchange === old));
  });
}

function open(other) {
  stop();
  setRunning(null);
  conversation = other;
  notices.showError("");
  settings.set("system", other.system);
  showConversation();
  toEnd();
  restFocus();
}

function startAnew() {
  open(newConversation(settings.get("system") ?? ""));
  announce("New chat.");
  question.focus();
}

function rename(one, title) {
  one.title = title;
  save(one);
  if (one === conversation) showConversation();
}

function remove(one) {
  removed.add(one);
  store.remove(one);
  if (one === conversation) startAnew();
  else sidebar.show(conversation);
  notices.tell(`Deleted “${titleOf(one)}”.`, "Undo", () => {
    removed.delete(one);
    save(one);
    open(one);
  });
}

function importText(text) {
  try {
    const { added, known, isFull } = store.import(text);
    const more = known ? `; ${known} ${known === 1 ? "was" : "were"} here already` : "";
    notices.tell(`Imported ${added} ${added === 1 ? "conversation" : "conversations"}${more}.`);
    if (isFull) tellFull();
  } catch (error) {
    notices.showError(error.message);
  }
  sidebar.show(conversation);
}

function changeSetting(name) {
  if (name === "system" && conversation.system !== (settings.get("system") ?? "")) {
    conversation.system = settings.get("system") ?? "";
    if (conversation.exchanges.length) save(conversation);
  }
  if (name === "show_tokens" && !running) showConversation();
  if (name === "key") greet();
  showMeter();
}

// Another window saved or deleted a conversation.
function changedElsewhere(id) {
  if (id === conversation.id && !running) {
    conversation = store.get(id) ?? newConversation(conversation.system);
    showConversation();
  } else {
    sidebar.show(conversation);
  }
}

// The server ----------------------------------------------------------------------------------------------------------

// Learn what it serves. Where it cannot be reached that is said, and tried again until it can.
async function greet(signal) {
  try {
    settings.offer(await fetchModels(signal));
    isKnown = true;
    if (["offline", "key"].includes(notices.errorKind())) notices.showError("");
    showMeter();
  } catch (error) {
    if (signal) return; // the question itself will tell
    if (error instanceof ChatError) report(error);
    else console.error(error);
  }
}

function report(error) {
  notices.showError(error.message, error.kind);
  if (error.kind !== "offline") return;
  clearTimeout(nextGreeting);
  nextGreeting = setTimeout(comeBack, ASK_AGAIN_MS);
}

function comeBack() {
  if (notices.errorKind() === "offline") greet();
}

// On screen -----------------------------------------------------------------------------------------------------------

function showConversation() {
  remember(CURRENT, conversation.id, "sessionStorage");
  log.replaceChildren();
  views = [];
  for (const exchange of conversation.exchanges) show(exchange);
  refresh();
  showMeter();
  sidebar.show(conversation);
}

// The view of an exchange that is new on the screen.
function show(exchange) {
  const view = new ExchangeView(exchange, { edit, regenerate }, settings.showsTokens);
  views.push(view);
  log.append(view.element);
  refresh();
  return view;
}

function setRunning(controller) {
  const wasElsewhere = document.activeElement !== question;
  running = controller;
  document.body.classList.toggle("is-running", Boolean(controller));
  byId("stop").hidden = !controller;
  byId("send").hidden = Boolean(controller);
  refresh();
  if (wasElsewhere && document.activeElement === document.body) restFocus();
}

// The box is as high as its text, and only text can be sent.
function refresh() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  byId("send").disabled = !question.value.trim();
  byId("welcome").hidden = log.childElementCount > 0;
  byId("chat-title").textContent = titleOf(conversation);
  document.body.classList.toggle("is-compared", settings.models.length > 1);
}

// How much of the context the last answer left, and which models answer.
function showMeter() {
  const [last] = conversation.exchanges.at(-1)?.answers ?? [];
  const context = settings.models[0]?.context_tokens;
  const used = last?.context_used;
  const isFull = used >= NEARLY_FULL * context;
  const facts = [
    settings.models.map(({ id }) => id).join(" and "),
    used && context && `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens of context`,
    (isFull || last?.numLeft) && "the oldest turns are forgotten",
  ];
  byId("meter").textContent = facts.filter(Boolean).join(" · ");
  byId("meter").classList.toggle("is-full", Boolean(isFull || last?.numLeft));
  document.body.classList.toggle("is-compared", settings.models.length > 1);
}

// An answer of the page itself, which is no part of the conversation.
function showRemark(text) {
  log.append(el("p", { class: "remark" }, text));
  refresh();
  toEnd();
  announce(text);
}

function tellFull() {
  const what = "The browser has no room left for conversations: this one is lost when the page is closed.";
  notices.showError(`${what} Export some and delete them.`);
}

function save(one) {
  if (removed.has(one)) return;
  if (one.exchanges.length === 0) store.remove(one);
  else if (!store.save(one)) tellFull();
}

// Wiring --------------------------------------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("input", refresh);
question.addEventListener("keydown", (event) => {
  // isComposing: Enter that picks a word of an input method is no Enter.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !question.value && !running && views.length) {
    event.preventDefault();
    views.at(-1).edit(views.at(-1).exchange.question);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) sidebar.isOver ? sidebar.toggle(false) : stop();
  if (event.ctrlKey && event.key === "k") {
    event.preventDefault();
    sidebar.toggle(true);
    byId("search").focus();
  }
});
byId("stop").addEventListener("click", stop);
byId("fresh").addEventListener("click", startAnew);
byId("retry").addEventListener("click", () => {
  notices.showError("");
  if (isKnown) retry();
  else greet();
});
byId("settings-button").addEventListener("click", () => byId("settings").showModal());
byId("enter-key").addEventListener("click", () => {
  byId("settings").showModal();
  byId("key").focus();
});
for (const button of byId("suggestions").children) button.addEventListener("click", () => send(button.textContent));

showConversation();
toEnd();
greet();

// A question and its answers on screen. Each view holds the object that it shows, so that nothing is ever found by
// counting elements.

import { copyButton, el, icon, iconButton, restFocus } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { textOf } from "./store.js";
import { TokenView } from "./tokens.js";

export const scroller = document.getElementById("scroller");

// What a kept answer's `note` says.
export const NOTES = {
  "": "",
  stopped: "Stopped.",
  length: "Cut off: the longest allowed answer.",
  broken: "The answer broke off here.",
  left: "The page was left while this was being written.",
  empty: "The model had nothing to say.",
};

export class ExchangeView {
  // on: {edit(exchange, text), regenerate(exchange)}
  constructor(exchange, on, showsTokens) {
    this.exchange = exchange;
    this.on = on;
    this.showsTokens = showsTokens;
    this.question = el("div", { class: "question" });
    this.answersBox = el("div", { class: "answers" });
    this.element = el("article", { class: "exchange" }, this.question, this.answersBox);
    this.#showQuestion();
    this.showAnswers();
  }

  // Build the answers anew, as many as there are now.
  showAnswers() {
    const { answers } = this.exchange;
    this.answers = answers.map((answer) => new AnswerView(answer, this.showsTokens, answers.length > 1));
    this.answersBox.replaceChildren(...this.answers.map((view) => view.element));
    this.answersBox.classList.toggle("is-compared", answers.length > 1);
    const label = answers.length > 1 ? "Answer both again" : "Answer again";
    const again = () => this.on.regenerate(this.exchange);
    this.answers.at(-1)?.actions.append(iconButton("redo", label, again, { class: "icon-button when-idle" }));
  }

  #showQuestion() {
    const { question } = this.exchange;
    this.question.replaceChildren(
      el("h2", { class: "unseen" }, "You"),
      el("div", { class: "actions" },
        copyButton("Copy the question", () => question),
        iconButton("pencil", "Edit the question", () => this.edit(question), { class: "icon-button when-idle" })),
      el("div", { class: "body" }, question));
  }

  edit(text) {
    const box = el("textarea", { "aria-label": "Edit the question", rows: Math.min(12, text.split("\n").length + 1) });
    box.value = text;
    const cancel = () => {
      this.#showQuestion();
      restFocus();
    };
    const send = () => {
      if (box.value.trim()) this.on.edit(this.exchange, box.value);
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.question.replaceChildren(
      el("div", { class: "editor" }, box,
        el("div", { class: "row" },
          el("button", { type: "button", onclick: cancel }, "Cancel"),
          el("button", { type: "button", class: "primary", onclick: send }, "Send again"))));
    box.focus();
  }
}

class AnswerView {
  #views = []; // one per part
  #body = el("div", { class: "body" });
  #note = el("p", { class: "note", hidden: true });
  #facts = el("span", { class: "facts" });

  constructor(answer, showsTokens, isCompared) {
    this.answer = answer;
    this.showsTokens = showsTokens;
    const copyAll = copyButton("Copy the answer", () => textOf(answer.parts));
    this.actions = el("div", { class: "actions" }, copyAll, this.#facts);
    const name = el("h2", { class: isCompared ? "model" : "unseen" }, isCompared ? answer.model : "nanochat");
    this.element = el("section", { class: "answer" }, name, this.#body, this.#note, this.actions);
    this.paint(false);
  }

  // Bring the screen to what the answer is now; isWriting: more of it will come.
  paint(isWriting) {
    const { parts, note, seed, tokens_per_s } = this.answer;
    this.element.classList.toggle("is-writing", isWriting);
    this.element.ariaBusy = String(isWriting);
    parts.forEach((part, i) => {
      this.#views[i] ??= this.#open(part, this.#views[i - 1]);
      this.#views[i].show(isWriting && i === parts.length - 1);
    });
    this.#note.textContent = isWriting ? "" : NOTES[note] ?? "";
    this.#note.hidden = !this.#note.textContent;
    const speed = tokens_per_s && `${tokens_per_s.toFixed(tokens_per_s < 10 ? 1 : 0)} tokens/s`;
    const facts = [speed, seed !== undefined && `seed ${seed}`];
    this.#facts.textContent = isWriting ? "" : facts.filter(Boolean).join(" · ");
  }

  // A part's view: {show(isOpen), box?}.
  #open(part, before) {
    if (part.type !== "text") return this.#openTool(part, before);
    const root = el("div", { class: "text" });
    this.#body.append(root);
    if (this.showsTokens && part.tokens) {
      const view = new TokenView(root);
      return { show: () => view.show(part.tokens) };
    }
    const view = new MarkdownView(root);
    return { show: (isOpen) => view.show(part.text, isOpen) };
  }

  // A call and what the tool said to it are one box.
  #openTool(part, before) {
    const isResult = part.type === "python_output";
    const [drawing, name] = isResult ? ["result", "result"] : ["tool", "tool call"];
    const code = el("code");
    const box = (isResult && before?.box) || el("div", { class: "tool" });
    box.append(el("p", {}, el("span", { class: "name" }, icon(drawing), name), code));
    if (!box.isConnected) this.#body.append(box);
    return { box, show: () => (code.textContent = part.text) };
  }
}

// Make a change; whoever was reading the end still does.
export function keepAtEnd(change) {
  const wasAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  change();
  if (wasAtEnd) toEnd();
}

export function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

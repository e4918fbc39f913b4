// What is on screen. Text of people and models enters the page as text nodes only, never as markup.

const NAMES = { python: "calculator", python_output: "result" };

export const scroller = document.getElementById("scroller");
const log = document.getElementById("log");
const welcome = document.getElementById("welcome");
const errorBox = document.getElementById("error");
const status = document.getElementById("status");

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.append(text);
  return made;
}

function addMessage(role, speaker) {
  const message = element("article", `message ${role}`);
  const body = element("div", "body");
  message.append(element("span", "unseen", `${speaker}: `), body);
  keepAtEnd(() => {
    welcome.hidden = true;
    log.append(message);
  });
  return { message, body };
}

// Shows a question; returns a function that takes it off the screen again.
export function showQuestion(text) {
  const { message, body } = addMessage("user", "You");
  body.append(text);
  scroller.scrollTop = scroller.scrollHeight;
  return () => {
    message.remove();
    welcome.hidden = log.childElementCount > 0;
  };
}

// An answer that grows.
export class AnswerView {
  #message;
  #body;
  #texts = []; // one text node per part

  constructor() {
    const { message, body } = addMessage("assistant is-writing", "nanochat");
    this.#message = message;
    this.#body = body;
    message.setAttribute("aria-busy", "true");
    scroller.scrollTop = scroller.scrollHeight;
  }

  add({ index, type, text }) {
    keepAtEnd(() => {
      this.#texts[index] ??= this.#open(type);
      this.#texts[index].appendData(text);
    });
  }

  // note: a remark under the answer, such as why it is incomplete.
  end(note = "") {
    this.#message.classList.remove("is-writing");
    this.#message.removeAttribute("aria-busy");
    if (note) keepAtEnd(() => this.#message.append(element("p", "note", note)));
  }

  remove() {
    this.#message.remove();
  }

  #open(type) {
    const node = document.createTextNode("");
    if (type === "text") {
      this.#body.append(node);
    } else {
      const tool = element("div", `tool ${type}`);
      const code = element("code", "");
      code.append(node);
      tool.append(element("span", "name", NAMES[type]), code);
      this.#body.append(tool);
    }
    return node;
  }
}

export function clearMessages() {
  log.replaceChildren();
  welcome.hidden = false;
}

export function showError(text) {
  errorBox.querySelector("p").textContent = text;
  errorBox.hidden = !text;
}

// Said aloud by screen readers: the growing answer itself would be read token by token.
export function announce(text) {
  status.textContent = text;
}

// Make a change; whoever was reading the end still does.
function keepAtEnd(change) {
  const wasAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  change();
  if (wasAtEnd) scroller.scrollTop = scroller.scrollHeight;
}

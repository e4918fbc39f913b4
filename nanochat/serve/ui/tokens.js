// An answer as its tokens, each tinted by how likely the model held it. Pointing at one, or walking there with the
// arrow keys, shows what else could have stood in its place.

import { announce, el } from "./dom.js";

const STEPS = [0.02, 0.1, 0.3, 0.6, 0.9]; // bounds of the tints
const card = document.getElementById("token-card");
const tokenOf = new WeakMap(); // element -> [text, logprob, top, isForced]

// The form in which a token of a server's event is kept: short, for there are many.
export function packed({ text, logprob, top = [], forced = false }) {
  const short = (value) => (typeof value === "number" ? Math.round(value * 1000) / 1000 : null);
  return [text, short(logprob), top.map(([other, value]) => [other, short(value)]), forced];
}

export class TokenView {
  #root;
  #num = 0; // tokens on screen

  constructor(root) {
    this.#root = root;
    root.classList.add("tokens");
    root.tabIndex = 0;
    root.role = "group";
    root.ariaLabel = "Tokens; the arrow keys walk through them";
    root.addEventListener("pointerover", (event) => showCard(event.target));
    root.addEventListener("click", (event) => showCard(event.target));
    root.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hideCard());
    root.addEventListener("blur", hideCard);
    root.addEventListener("keydown", (event) => this.#walk(event));
  }

  show(tokens) {
    this.#root.append(...tokens.slice(this.#num).map(tokenElement));
    this.#num = tokens.length;
  }

  #walk(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape" && !card.hidden) {
      event.stopPropagation();
      hideCard();
    }
    if (!step) return;
    event.preventDefault();
    const current = this.#root.querySelector(".is-current");
    const next = !current ? this.#root.firstChild : step > 0 ? current.nextSibling : current.previousSibling;
    if (!next) return;
    showCard(next);
    announce(card.innerText);
  }
}

function tokenElement(token) {
  const [text, logprob, , isForced] = token;
  const likely = logprob === null ? STEPS.length : STEPS.filter((step) => Math.exp(logprob) >= step).length;
  const made = el("span", { class: `token p${likely}${isForced ? " is-forced" : ""}` }, text);
  tokenOf.set(made, token);
  return made;
}

function showCard(element) {
  const token = tokenOf.get(element);
  if (!token) return;
  hideCard();
  element.classList.add("is-current");
  const [text, logprob, top, isForced] = token;
  const own = el("p", {}, el("b", {}, visible(text)), isForced ? " was given by a tool" : ` ${percent(logprob)}`);
  card.replaceChildren(own, el("ol", {}, ...top.map(([other, value]) => candidate(other, value, other === text))));
  card.hidden = false;
  place(element);
}

function hideCard() {
  card.hidden = true;
  for (const element of document.querySelectorAll(".is-current.token")) element.classList.remove("is-current");
}

function candidate(text, logprob, isChosen) {
  const bar = el("span", { class: "bar" });
  bar.style.width = `${Math.max(2, 100 * Math.exp(logprob))}%`;
  const share = el("span", {}, percent(logprob));
  return el("li", { class: isChosen && "is-chosen" }, el("code", {}, visible(text)), share, bar);
}

function place(element) {
  const { left, top, bottom } = element.getClientRects()[0];
  const { offsetWidth, offsetHeight } = card;
  const above = top - offsetHeight - 6;
  card.style.left = `${Math.max(8, Math.min(left, innerWidth - offsetWidth - 8))}px`;
  card.style.top = `${above > 8 ? above : Math.min(bottom + 6, innerHeight - offsetHeight - 8)}px`;
}

function percent(logprob) {
  if (logprob === null) return "";
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? "< 0.1 %" : `${share.toFixed(share < 10 ? 1 : 0)} %`;
}

// Spaces and line ends can be seen.
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

// A block of code: its language, a button that copies it, and colours. The colours come from the server as
// [kind, text] pairs and only ever become text in spans, and only if the texts together are the code.

import { fetchHighlight } from "./api.js";
import { copyButton, el } from "./dom.js";

const KINDS = "keyword function type constant string number comment operator added removed".split(" ");
const coloured = new Map(); // language and code -> pairs, for those who come back to a conversation
const MAX_KEPT = 200;
let queue = Promise.resolve(); // one question at a time

export function codeBlock(language, code) {
  const shown = el("code", {}, code);
  const name = /^[\w+#.-]{1,20}$/.test(language) ? language : "";
  return el("figure", { class: "code", "data-language": name },
    el("figcaption", {}, el("span", {}, name || "code"), copyButton("Copy the code", () => shown.textContent)),
    el("pre", { tabindex: 0 }, shown));
}

// Colour all code in and below an element that will not change any more.
export function showColours(element) {
  const figures = element.matches("figure.code") ? [element] : element.querySelectorAll("figure.code");
  for (const figure of figures) {
    if (figure.dataset.language) queue = queue.then(() => colour(figure)).catch(() => {}); // plain code is good enough
  }
}

async function colour(figure) {
  const shown = figure.querySelector("code");
  const code = shown.textContent;
  if (!figure.isConnected || !code.trim()) return;
  const key = `${figure.dataset.language}\n${code}`;
  const pairs = coloured.get(key) ?? (await fetchHighlight(figure.dataset.language, code));
  if (!pairs || shown.textContent !== code || pairs.map(([, text]) => text).join("") !== code) return;
  coloured.set(key, pairs);
  if (coloured.size > MAX_KEPT) coloured.delete(coloured.keys().next().value);
  shown.replaceChildren(...pairs.map(([kind, text]) => {
    return KINDS.includes(kind) ? el("span", { class: `is-${kind}` }, text) : text;
  }));
}

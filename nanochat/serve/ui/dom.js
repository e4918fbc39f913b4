// Small things for building the page. Texts become text nodes, always: no string is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

// An element. `onclick` and the like are listeners; an attribute that is true stands without a value; children that are
// null or "" are left out.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null && child !== ""));
  return made;
}

// One of the drawings at the top of index.html.
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.append(use);
  return drawing;
}

// A button that is a drawing, with its name in words for those who do not see it.
export function iconButton(name, label, onclick, attributes = {}) {
  const own = { type: "button", class: "icon-button", "aria-label": label, title: label, onclick };
  return el("button", { ...own, ...attributes }, icon(name));
}

// Make the children of `old` equal to those of `fresh`, touching as little as can be: a text that only grew is appended
// to, so what is selected stays selected and nothing flickers.
export function morph(old, fresh) {
  const before = [...old.childNodes];
  [...fresh.childNodes].forEach((node, i) => {
    const was = before[i];
    if (!was) old.append(node);
    else if (was.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) growText(was, node.data);
    else if (was.cloneNode(false).isEqualNode(node.cloneNode(false))) morph(was, node);
    else was.replaceWith(node);
  });
  for (const left of before.slice(fresh.childNodes.length)) left.remove();
}

function growText(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

// Copy, also where the browser has no clipboard for pages: those that come without encryption from another computer.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = el("textarea", { class: "unseen" });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

// A button that copies what `text()` gives, and says for a moment that it did.
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    announce("Copied.");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

// Said aloud by screen readers.
export function announce(text) {
  document.getElementById("status").textContent = text;
}

// Where the keyboard goes when its place has gone. On a touch screen the box would call up the keyboard.
export function restFocus() {
  const place = matchMedia("(hover: none)").matches ? "scroller" : "question";
  document.getElementById(place).focus({ preventScroll: true });
}

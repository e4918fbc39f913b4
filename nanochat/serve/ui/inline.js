// Markdown inside a paragraph: emphasis, code, links. Text in, DOM nodes out.
//
// One pass from left to right. A mark that may open something (*, _, ~~ or [) pushes a frame, which collects the nodes
// that follow; a mark that closes it makes them an element; a frame that nothing closes was plain text. So the work is
// linear in the text, whatever stands in it. While an answer grows, an emphasis or code that has no end yet is shown as
// if it ended here: the reader sees bold words, not asterisks that become bold later.

import { el } from "./dom.js";

const ELEMENTS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };
const MAX_DEPTH = 20; // of elements in each other: deeper marks are text
const ORDINARY = /[^\\`*_~[\]!<\nh]+/y;
const ADDRESS = /https?:\/\/[^\s<>"`\\^{|}]+/y;
const TARGET = /\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"\n]*")?\s*\)/y;
const WORD = /[\p{L}\p{N}_]/u;
const SPACE = /^\s?$/; // also the edge of the text
const PUNCTUATION = /[!-/:-@[-`{-~]/;

// The address if it is safe to follow, else null: no javascript:, no data:, nothing relative to this page.
export function safeAddress(text) {
  let address;
  try {
    address = new URL(text);
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
}

// The nodes of a paragraph; isOpen: more of it may come.
export function inline(text, isOpen = false) {
  return new Reader(text, isOpen).read();
}

class Reader {
  #at = 0;
  #frames = [{ nodes: [] }]; // the first is the paragraph itself

  constructor(text, isOpen) {
    this.text = text;
    this.isOpen = isOpen;
  }

  read() {
    while (this.#at < this.text.length) this.#step(this.text[this.#at]);
    while (this.#frames.length > 1) this.#giveUp(this.isOpen);
    return this.#frames[0].nodes;
  }

  #step(character) {
    if (character === "\\") this.#escape();
    else if (character === "`") this.#code();
    else if (character in ELEMENTS) this.#mark(character);
    else if (character === "[") this.#openLink("[");
    else if (character === "!" && this.text[this.#at + 1] === "[") this.#openLink("![");
    else if (character === "]") this.#closeLink();
    else if (character === "<") this.#angle();
    else if (character === "h") this.#address();
    else if (character === "\n") this.#break();
    else this.#take(this.#match(ORDINARY) ?? character);
  }

  #take(text, length = text.length) {
    this.#at += length;
    this.#add(text);
  }

  // Texts side by side are one node.
  #add(node) {
    const { nodes } = this.#frames.at(-1);
    if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + node);
    else if (node !== "") nodes.push(node);
  }

  #match(pattern) {
    pattern.lastIndex = this.#at;
    return pattern.exec(this.text)?.[0];
  }

  #escape() {
    const next = this.text[this.#at + 1] ?? "";
    if (PUNCTUATION.test(next)) this.#take(next, 2);
    else this.#take("\\");
  }

  #break() {
    const { nodes } = this.#frames.at(-1);
    if (typeof nodes.at(-1) === "string") nodes.push(nodes.pop().trimEnd());
    this.#at += 1;
    this.#add(el("br"));
  }

  #code() {
    const run = this.#match(/`+/y);
    const from = this.#at + run.length;
    let end = this.#endOfCode(run.length, from);
    if (end < 0) {
      if (!this.isOpen || from === this.text.length) return this.#take(run);
      end = this.text.length;
    }
    const code = this.text.slice(from, end).replaceAll("\n", " ");
    const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
    this.#add(el("code", {}, isPadded ? code.slice(1, -1) : code));
    this.#at = Math.min(end + run.length, this.text.length);
  }

  // Where a run of this length comes again. Looking for it in vain is seldom: only once for each length.
  #endOfCode(length, from) {
    const runs = /`+/g;
    runs.lastIndex = from;
    for (let found; (found = runs.exec(this.text)); ) {
      if (found[0].length === length) return found.index;
    }
    return -1;
  }

  #mark(character) {
    const run = this.#match({ "*": /\*+/y, _: /_+/y, "~": /~+/y }[character]);
    const before = this.text[this.#at - 1] ?? "";
    const after = this.text[this.#at + run.length] ?? "";
    this.#at += run.length;
    // Inside a word it is no emphasis: snake_case and 2*3*4 are meant as they are written.
    const isInside = WORD.test(before) && WORD.test(after);
    const canOpen = !SPACE.test(after) && !isInside;
    const canClose = !SPACE.test(before) && !isInside;
    const left = canClose ? this.#close(character, run.length) : run.length;
    const isOpening = left && canOpen && left <= 3 && this.#frames.length < MAX_DEPTH;
    if (isOpening) this.#frames.push({ character, count: left, nodes: [] });
    else if (left) this.#add(character.repeat(left));
  }

  // Close what this mark opened, as often as `count` reaches; returns what is left of it.
  #close(character, count) {
    while (count) {
      const opener = this.#frames.findLastIndex((frame) => frame.character === character);
      if (opener < 1 || this.#frames.slice(opener).some((frame) => frame.link && frame.isAlive)) return count;
      const used = Math.min(count, this.#frames[opener].count, 2);
      const tag = ELEMENTS[character][used - 1];
      const isEmpty = !this.#frames[opener].nodes.length && opener === this.#frames.length - 1;
      if (!tag || isEmpty) return count;
      while (this.#frames.length > opener + 1) this.#giveUp(false);
      const frame = this.#frames.pop();
      const made = el(tag, {}, ...frame.nodes);
      count -= used;
      frame.count -= used;
      if (frame.count) this.#frames.push({ ...frame, nodes: [] });
      this.#add(made);
    }
    return count;
  }

  // The innermost frame was none: what opened it is text. In a text that grows it may still become one.
  #giveUp(mayClose) {
    const frame = this.#frames.pop();
    const tag = mayClose && frame.character && ELEMENTS[frame.character][Math.min(frame.count, 2) - 1];
    if (tag) {
      if (frame.nodes.length) this.#add(el(tag, {}, ...frame.nodes));
      return;
    }
    this.#add(frame.link ?? frame.character.repeat(frame.count));
    for (const node of frame.nodes) this.#add(node);
  }

  #openLink(link) {
    this.#at += link.length;
    if (this.#frames.length < MAX_DEPTH) this.#frames.push({ link, isAlive: true, nodes: [] });
    else this.#add(link);
  }

  #closeLink() {
    const opener = this.#frames.findLastIndex((frame) => frame.link);
    if (opener < 1) return this.#take("]");
    this.#at += 1;
    while (this.#frames.length > opener + 1) this.#giveUp(false);
    const frame = this.#frames.pop();
    TARGET.lastIndex = this.#at;
    const target = frame.isAlive && TARGET.exec(this.text);
    const address = target && safeAddress(target[1]);
    if (address) {
      this.#at += target[0].length;
      for (const outer of this.#frames) outer.isAlive = false; // no link inside a link
      return this.#add(link(address, frame.nodes));
    }
    const isUnfinished = this.isOpen && frame.isAlive && this.#match(/\([^()\s]*$/y);
    if (isUnfinished) this.#at = this.text.length;
    else this.#add(frame.link);
    for (const node of frame.nodes) this.#add(node);
    if (!isUnfinished) this.#add("]");
  }

  #angle() {
    const found = this.#match(/<(?:https?:\/\/|mailto:)[^\s<>]+>/y);
    const address = found && safeAddress(found.slice(1, -1));
    if (!address) return this.#take("<");
    this.#at += found.length;
    this.#add(link(address, [found.slice(1, -1)]));
  }

  #address() {
    const isStart = !WORD.test(this.text[this.#at - 1] ?? "") && !this.#frames.some((frame) => frame.link);
    const found = isStart && withoutEndMarks(this.#match(ADDRESS) ?? "");
    const address = found && safeAddress(found);
    if (!address) return this.#take("h");
    this.#at += found.length;
    this.#add(link(address, [found]));
  }
}

// An address without what belongs to the sentence around it.
function withoutEndMarks(address) {
  let end = address.length;
  const marks = address.includes("(") ? ".,;:!?'*_~]" : ".,;:!?'*_~])";
  while (end && marks.includes(address[end - 1])) end -= 1;
  return address.slice(0, end);
}

// A link leads away from here, into a window of its own which knows nothing of this one. Its address is its title, so
// that a text cannot pretend to be another address.
function link(address, nodes) {
  return el("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);
}

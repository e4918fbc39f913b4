// Markdown as a model writes it: headings, lists, quotes, tables, code, paragraphs. Text in, DOM nodes out; HTML in the
// text is text.
//
// The text is cut into blocks, each with the lines it came from. A view that shows a growing text parses all of it
// again, but touches only the blocks whose lines have changed, which is the last one as a rule.

import { codeBlock, showColours } from "./code.js";
import { el, morph } from "./dom.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8; // of lists and quotes in each other; what is deeper is a paragraph
// None of these can go back and forth over a long line: hostile text must not stop the page.
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;

// Shows a text that grows.
export class MarkdownView {
  #root;
  #sources = []; // of the blocks on screen

  constructor(root) {
    this.#root = root;
  }

  // isOpen: more of the text will come.
  show(text, isOpen) {
    const blocks = parse(text.split(/\r?\n/));
    blocks.forEach((block, i) => {
      const isLast = isOpen && i === blocks.length - 1;
      const source = `${isLast ? "open" : "done"} ${block.source}`;
      if (this.#sources[i] === source) return;
      this.#sources[i] = source;
      this.#place(i, block.build(isLast));
      if (!isLast) showColours(this.#root.children[i]);
    });
    while (this.#root.children.length > blocks.length) this.#root.lastChild.remove();
    this.#sources.length = blocks.length;
  }

  #place(i, fresh) {
    const was = this.#root.children[i];
    if (!was) this.#root.append(fresh);
    else if (was.cloneNode(false).isEqualNode(fresh.cloneNode(false))) morph(was, fresh);
    else was.replaceWith(fresh);
  }
}

// The blocks of a text: {source, build(isOpen)}.
function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const readers = depth < MAX_DEPTH ? [fence, heading, rule, quote, table, list, paragraph] : [paragraph];
    for (const read of readers) {
      const found = read(lines, at, depth);
      if (!found) continue;
      blocks.push({ source: lines.slice(at, found.end).join("\n"), build: found.build });
      at = found.end;
      break;
    }
  }
  return blocks;
}

// Nodes of lines that stand inside a list item or a quote.
function nested(lines, depth, isOpen) {
  const blocks = parse(lines, depth + 1);
  return blocks.map((block, i) => block.build(isOpen && i === blocks.length - 1));
}

// Each reader returns {end, build} if its kind of block begins at line `at`: `end` is the line after it.

function fence(lines, at) {
  const [, mark, info] = FENCE.exec(lines[at]) ?? [];
  if (!mark) return null;
  const isEnd = (line) => line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return { end: Math.min(end + 1, lines.length), build: () => codeBlock(info.trim().split(/\s/)[0], code) };
}

function heading(lines, at) {
  const [opening, marks] = HEADING.exec(lines[at]) ?? [];
  if (!marks) return null;
  const text = lines[at].slice(opening.length).trim().replace(/(^|[ \t])#+$/, "");
  const tag = `h${Math.min(marks.length + 2, 6)}`; // the page itself has the first two
  return { end: at + 1, build: (isOpen) => el(tag, {}, ...inline(text, isOpen)) };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { end: at + 1, build: () => el("hr") } : null;
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === at) return null;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { end, build: (isOpen) => el("blockquote", {}, ...nested(inside, depth, isOpen)) };
}

function table(lines, at) {
  const next = lines[at + 1];
  if (!lines[at].includes("|") || !next?.includes("-")) return null;
  const head = cells(lines[at]);
  const marks = cells(next);
  if (head.length !== marks.length || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  const sides = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "middle" : "right") : null));
  const cell = (tag, side, text) => el(tag, { class: side, scope: tag === "th" && "col" }, ...inline(text));
  const row = (tag, texts) => el("tr", {}, ...sides.map((side, i) => cell(tag, side, texts[i] ?? "")));
  const build = () =>
    el("div", { class: "table", tabindex: 0 },
      el("table", {},
        el("thead", {}, row("th", head)),
        el("tbody", {}, ...lines.slice(at + 2, end).map((line) => row("td", cells(line))))));
  return { end, build };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]) ?? [];
  if (!mark || indent.length > 3) return null;
  const items = [];
  let end = at;
  while (end < lines.length) {
    const next = nextWritten(lines, end);
    const item = ITEM.exec(lines[next] ?? "");
    const isSibling = item && item[1].length <= indent.length + 1 && !RULE.test(lines[next]);
    if (isSibling ? isNumber(item[2]) !== isNumber(mark) : !goesOn(lines, end, next, indent.length)) break;
    const inside = isSibling ? [] : items.at(-1).lines;
    for (; end < next; end += 1) items.at(-1).lines.push("");
    if (isSibling) items.push({ width: item[0].length, lines: inside });
    inside.push(isSibling ? lines[next].slice(item[0].length) : dedent(lines[next], items.at(-1).width));
    end += 1;
  }
  const start = parseInt(mark, 10);
  const build = (isOpen) =>
    el(isNumber(mark) ? "ol" : "ul", { start: start > 1 && start },
      ...items.map((item, i) => el("li", {}, ...itemNodes(item.lines, depth, isOpen && i === items.length - 1))));
  return { end, build };
}

// Whether line `next`, which is no item, belongs to the list whose last line was before `at`.
function goesOn(lines, at, next, indent) {
  if (next >= lines.length) return false;
  if (leading(lines[next]) > indent + 1) return true;
  return next === at && !beginsBlock(lines[next]); // the rest of a sentence, not indented
}

function nextWritten(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

function isNumber(mark) {
  return /\d/.test(mark);
}

// An item that is one paragraph is shown without a paragraph's distances.
function itemNodes(lines, depth, isOpen) {
  const nodes = nested(lines, depth, isOpen);
  return nodes.flatMap((node, i) => (i === 0 && node.localName === "p" ? [...node.childNodes] : [node]));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end])) end += 1;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd();
  return { end, build: (isOpen) => el("p", {}, ...inline(text, isOpen)) };
}

function beginsBlock(line) {
  const item = ITEM.exec(line);
  const interrupts = item && item[0].length < line.length && (!isNumber(item[2]) || parseInt(item[2], 10) === 1);
  return interrupts || [FENCE, HEADING, RULE, QUOTE].some((pattern) => pattern.test(line));
}

function leading(line) {
  return line.length - line.trimStart().length;
}

function dedent(line, width) {
  return line.slice(Math.min(width, leading(line)));
}

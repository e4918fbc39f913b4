// The list of conversations: choose, search, rename, delete, import, export.

import { announce, el, iconButton } from "./dom.js";
import { excerpt, fileOf, titleOf } from "./store.js";

const byId = (id) => document.getElementById(id);
const MAX_READ_BYTES = 2 ** 26; // of a file; what is longer is refused as too long, and need not be read
const narrow = matchMedia("(max-width: 52rem)"); // where the list lies over the page

export class Sidebar {
  // on: {open(conversation), create(), remove(conversation), rename(conversation, title), import(text)}
  constructor(store, on) {
    this.store = store;
    this.on = on;
    this.list = byId("conversations");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.show());
    byId("new-chat").addEventListener("click", () => this.#leaving(() => on.create()));
    byId("toggle").addEventListener("click", () => this.toggle());
    byId("veil").addEventListener("click", () => this.toggle(false));
    byId("export").addEventListener("click", () => download("nanochat-conversations.json", fileOf(store.find())));
    byId("import").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", (event) => this.#import(event.target));
    narrow.addEventListener("change", () => this.toggle(!narrow.matches));
    this.toggle(!narrow.matches);
  }

  get isOver() {
    return narrow.matches && this.isOpen;
  }

  toggle(isOpen = !this.isOpen) {
    const wasOver = this.isOver;
    this.isOpen = isOpen;
    byId("sidebar").hidden = !isOpen;
    byId("veil").hidden = !this.isOver;
    byId("stage").inert = this.isOver; // behind the list nothing can be reached
    byId("toggle").setAttribute("aria-expanded", String(isOpen));
    if (this.isOver) byId("new-chat").focus();
    else if (wasOver) byId("toggle").focus();
  }

  // current: the conversation that is open.
  show(current = this.current) {
    this.current = current;
    const query = this.search.value.trim();
    const found = this.store.find(query);
    this.list.replaceChildren(...found.map((conversation) => this.#row(conversation, query)));
    byId("none-found").hidden = found.length > 0;
    byId("none-found").textContent = query ? "Nothing found." : "Nothing here yet.";
    byId("export").disabled = this.store.find().length === 0;
  }

  #row(conversation, query) {
    const isCurrent = conversation === this.current;
    const title = titleOf(conversation);
    const open = el("button", {
      type: "button", class: "open", "aria-current": isCurrent && "true",
      onclick: () => this.#leaving(() => this.on.open(conversation)),
    }, el("span", { class: "title" }, title), query && el("small", {}, excerpt(conversation, query)));
    const row = el("li", { class: isCurrent && "is-current" }, open,
      iconButton("pencil", `Rename ${title}`, () => this.#rename(row, conversation)),
      iconButton("download", `Export ${title}`, () => download("nanochat-conversation.json", fileOf([conversation]))),
      iconButton("trash", `Delete ${title}`, () => this.on.remove(conversation)));
    return row;
  }

  #rename(row, conversation) {
    const field = el("input", { type: "text", "aria-label": "New title", maxlength: 200 });
    field.value = titleOf(conversation);
    let isOver = false;
    const finish = (isMeant) => {
      if (isOver) return;
      isOver = true;
      if (isMeant) this.on.rename(conversation, field.value.trim());
      this.show();
      this.list.querySelector(".is-current .open")?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      finish(event.key === "Enter");
    });
    field.addEventListener("blur", () => finish(true));
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  #leaving(act) {
    if (this.isOver) this.toggle(false);
    act();
  }

  async #import(input) {
    const [file] = input.files;
    if (!file) return;
    const text = await file.slice(0, MAX_READ_BYTES).text();
    input.value = "";
    this.on.import(text);
    announce("The file has been read.");
  }
}

function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

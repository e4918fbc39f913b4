// The two boxes above the composer: what went wrong, and what has been done.

import { el } from "./dom.js";

const byId = (id) => document.getElementById(id);
const errorBox = byId("error");
const toldBox = byId("told");

// kind: as of a ChatError; it says what can be done about it.
export function showError(text, kind = "") {
  errorBox.querySelector("p").textContent = text;
  errorBox.dataset.kind = kind;
  errorBox.hidden = !text;
  byId("retry").hidden = !["busy", "offline"].includes(kind);
  byId("fresh").hidden = kind !== "full";
  byId("enter-key").hidden = kind !== "key";
  if (kind === "key") byId("key-field").hidden = false;
  if (text) toldBox.hidden = true;
}

// Of the error that is shown; null where there is none.
export function errorKind() {
  return errorBox.hidden ? null : errorBox.dataset.kind;
}

// Something that was done; act: how to undo it, behind a button of this name.
export function tell(text, label = "", act = null) {
  const undo = () => {
    toldBox.hidden = true;
    act();
  };
  toldBox.querySelector("p").textContent = text;
  byId("undo")?.remove();
  if (label) toldBox.querySelector("p").after(el("button", { type: "button", id: "undo", onclick: undo }, label));
  toldBox.hidden = false;
}

for (const box of [errorBox, toldBox]) {
  box.querySelector(".close").addEventListener("click", () => {
    box.hidden = true;
    byId("question").focus();
  });
}

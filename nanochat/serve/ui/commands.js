// What begins with a slash is a command to the page: /temperature 0.5. The others come from the table of settings.

import { NUMBERS } from "./settings.js";

const OTHERS = { clear: "begin a new chat (this one stays in the list)", help: "this list" };

// The answer to a command in words, or null if the text is none. actions: {clear()}.
export function runCommand(text, settings, actions) {
  const [, name, value] = /^\/([a-z]*)(?:\s+(.*))?$/i.exec(text.trimEnd()) ?? [];
  if (name === undefined) return null;
  const setting = NUMBERS.find(({ command, name: field }) => command === name.toLowerCase() && settings.offers(field));
  if (setting) {
    const wrong = value === undefined ? "" : settings.setNumber(setting, value === "default" ? "" : value);
    return wrong || settings.describe(setting);
  }
  if (name.toLowerCase() === "clear") {
    actions.clear();
    return "";
  }
  return name.toLowerCase() === "help" ? help(settings) : `/${name} is no command. ${help(settings)}`;
}

function help(settings) {
  const offered = NUMBERS.filter(({ name }) => settings.offers(name));
  const rows = [
    ...offered.map(({ command, label, about }) => `/${command} NUMBER\t${label.toLowerCase()} (${about})`),
    ...Object.entries(OTHERS).map(([command, about]) => `/${command}\t${about}`),
  ];
  const about = "Without a number a command tells what is set; “default” in its place leaves it to the server.";
  return [...rows, "", about, "A message that begins with a slash: put a space before it."].join("\n");
}

// The page is not painted before this has run, so that a chosen theme is there from the start.

import { recall } from "./store.js";

const { theme } = recall("nanochat.settings", {});
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;

/** The page: four views as tabs, of which the one that is seen is active; its name is the address's fragment. */

import { Refused, ask } from "./api.js";
import { byId, element, problem } from "./dom.js";
import * as fleet from "./fleet.js";
import * as image from "./image.js";
import * as jobs from "./jobs.js";
import * as stream from "./stream.js";

const VIEWS = { image, stream, fleet, jobs };
const tabs = [...document.querySelectorAll("[role=tab]")];
const STEPS = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };

function show(name) {
  for (const tab of tabs) {
    const view = tab.getAttribute("aria-controls");
    const chosen = view === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId(view).hidden = !chosen;
    VIEWS[view].visible(chosen && !document.hidden);
  }
}

const wanted = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "image");

function choose(tab) {
  tab.focus();
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  show(wanted());
}

function onKey(event) {
  const step = STEPS[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const next = tabs.indexOf(event.target) + step;
  choose(tabs[Number.isFinite(step) ? (next + tabs.length) % tabs.length : step < 0 ? 0 : tabs.length - 1]);
}

async function listModels() {
  try {
    const { models } = await ask("models");
    byId("model").replaceChildren(
      ...models.map(({ name, task, engine }) => element("option", { value: name }, `${name} (${task}, ${engine})`)),
    );
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    problem("image-problem", error.message);
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", onKey);
}
window.addEventListener("hashchange", () => show(wanted()));
document.addEventListener("visibilitychange", () => show(wanted()));
show(wanted());
listModels();

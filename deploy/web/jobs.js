/** The view "Jobs": the dataset jobs of the cluster, how far each is, and on request what it has found so far. */

import { Refused, ask } from "./api.js";
import { byId, element, row } from "./dom.js";
import { drawResults } from "./draw.js";
import { poller } from "./poll.js";

const cards = new Map(); // job id → its card's changing parts

export const visible = poller("jobs", 3000, "jobs-problem", render);

function render({ jobs }) {
  for (const job of jobs ?? []) renderJob(job, cards.get(job.id) ?? addCard(job));
  byId("jobs-list").replaceChildren(...(jobs ?? []).map(({ id }) => cards.get(id).article));
  tell(summary(jobs));
}

function summary(jobs) {
  if (!jobs) return "No job has told of itself, and Ray's job API cannot be reached from here.";
  const running = jobs.filter(({ status }) => status === "RUNNING").length;
  return jobs.length ? `${jobs.length} ${jobs.length === 1 ? "job" : "jobs"}, ${running} running.` : "There has been no job yet.";
}

function tell(sentence) {
  const status = byId("jobs-status");
  if (status.textContent !== sentence) status.textContent = sentence;
}

function addCard({ id, entrypoint }) {
  const title = element("h2", { id: `job-${id}` }, id);
  const figures = element("dl", { class: "figures" });
  const bar = element("progress", { "aria-label": `Progress of ${id}` });
  const message = element("p", { class: "hint" });
  const shown = element("div", { id: `gallery-${id}`, hidden: "" });
  const button = element("button", { "aria-expanded": "false", "aria-controls": shown.id }, "Show results");
  button.addEventListener("click", () => toggle(id, button, shown));
  const command = element("p", {}, element("code", {}, entrypoint));
  const article = element("article", { class: "card", "aria-labelledby": title.id }, title, command, figures, bar, message, button, shown);
  cards.set(id, { article, figures, bar, message, button });
  return cards.get(id);
}

function renderJob({ status, started_at, ended_at, message, counts, out }, card) {
  const state = element("span", { class: `state-${status}` }, status);
  const done = counts && counts.resumed + counts.done;
  const shown = {
    "Status": state,
    "Inputs": counts ? `${done} of ${counts.total}` : "unknown",
    "Dead letters": counts ? counts.failed : "unknown",
    "Pace": pace(started_at, ended_at, counts),
    "Started": time(started_at),
    "Ended": time(ended_at),
  };
  card.figures.replaceChildren(...Object.entries(shown).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value instanceof Node ? value : String(value)))));
  card.bar.hidden = !counts;
  if (counts) Object.assign(card.bar, { max: counts.total || 1, value: done });
  card.message.textContent = message;
  card.button.hidden = !out;
}

const time = (seconds) => (seconds == null ? "not yet" : new Date(1000 * seconds).toLocaleString());

function pace(started, ended, counts) {
  const seconds = (ended ?? Date.now() / 1000) - started;
  return counts?.done && started && seconds > 0 ? `${(counts.done / seconds).toFixed(1)} a second` : "unknown";
}

async function toggle(id, button, shown) {
  shown.hidden = !shown.hidden;
  button.setAttribute("aria-expanded", String(!shown.hidden));
  button.textContent = shown.hidden ? "Show results" : "Hide results";
  if (shown.hidden) return;
  shown.replaceChildren(element("p", { class: "hint", role: "status" }, "Looking at what is committed …"));
  try {
    const gallery = await ask(`jobs/${encodeURIComponent(id)}/gallery`);
    const items = await Promise.all(gallery.samples.map(item));
    shown.replaceChildren(items.length ? list(id, items) : element("p", { class: "hint" }, "Nothing is committed yet."));
    if (gallery.dead_letters.length) shown.append(deadLetters(gallery.dead_letters));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    shown.replaceChildren(element("p", { class: "problem", role: "alert" }, error.message));
  }
}

const list = (id, items) => element("ul", { class: "gallery", "aria-label": `Some results of ${id}` }, ...items);

async function item({ name, picture, image: { shape: [height, width], results } }) {
  const found = results.length ? results.map((result) => result.name).join(", ") : "nothing found";
  const caption = element("p", {}, name);
  if (!picture) return element("li", {}, element("p", { class: "empty" }, "Its input cannot be read any more."), caption);
  const canvas = element("canvas", { role: "img", "aria-label": `${name} with ${found}` });
  const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
  const pixels = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.drawImage(pixels, 0, 0, width, height);
  drawResults(context, results);
  return element("li", {}, canvas, caption);
}

function deadLetters(letters) {
  const heads = ["Input", "Stage", "Reason"].map((head) => element("th", { scope: "col" }, head));
  const rows = letters.map(({ uri, stage, reason }) => row(uri, stage, reason));
  return element("div", { class: "scroll" }, element("table", {},
    element("caption", {}, "Some dead letters"), element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
}

/** The view "Fleet": each model's replicas, its last minute, and a log of what changed while somebody looked. */

import { ask } from "./api.js";
import { byId, element, row } from "./dom.js";
import { poller } from "./poll.js";

const MOST_EVENTS = 200;
const MOST_POINTS = 120; // of a curve: two minutes
const SVG = "http://www.w3.org/2000/svg";
const COLUMNS = ["Replica", "State", "Node", "Reserved", "Memory", "GPU peak", "Latest batches"];
const UNKNOWN = "unknown";
const cards = new Map(); // model name → its card's changing parts
let before = null; // the report before this one, from whichever ingress
const met = new Set(); // ingresses that have reported
const mourned = new Set(); // actor ids of the dead, each told once though several ingresses know of it

export const visible = poller("fleet", 1000, "fleet-problem", render);

/** The same while a stream is watched: who computes it. */
export const atWork = poller("fleet", 1000, "at-work-problem", renderAtWork);

function render(report) {
  const of = report.ingresses > 1 ? `one of ${report.ingresses} ingresses, each with numbers of its own` : "the ingress";
  byId("ingress").textContent =
    `As seen by ${of} (${report.ingress.slice(0, 8)}), up for ${duration(report.uptime_s)}. Latencies: the last minute.`;
  report.models.forEach((model) => renderModel(model, cards.get(model.name) ?? addCard(model.name)));
  if (before) changes(before, report).forEach(tell);
  const deaths = newDeaths(report);
  if (met.has(report.ingress)) deaths.forEach(tell); // else they are from before this page was opened
  met.add(report.ingress);
  before = report;
  listStreams();
}

function renderAtWork({ models }) {
  const model = models.find(({ name }) => name === byId("model").value) ?? models[0];
  byId("at-work").replaceChildren(...model.replicas.map(({ id, state, node, vitals }) => row(
    id, stated(state), known(node), megabytes(vitals?.memory_bytes), vitals ? vitals.batches.slice(-6).join(" ") : UNKNOWN,
  )));
  byId("at-work-summary").textContent = `${model.name}: p50 / p95 / p99 ${percentiles(model.last_minute.latency_ms)}, `
    + `${model.load.waiting} waiting, ${model.load.in_flight} in flight`;
}

async function listStreams() {
  const { streams = [] } = await ask("streams").catch(() => ({})); // a fleet without streams is a fleet
  byId("streams-card").hidden = !streams.length;
  byId("streams-rows").replaceChildren(...streams.map((stream) => row(
    stream.stream, stream.model, stream.tracker, String(stream.frames), String(stream.dropped), `${stream.idle_s.toFixed(0)} s ago`,
    Object.entries(stream.counts).map(([name, ways]) => `${name}: ${passed(ways)}`).join("; ") || "no lines or zones",
  )));
}

const passed = (ways) => Object.entries(ways)
  .map(([way, names]) => `${way} ${Object.values(names).reduce((sum, count) => sum + count, 0)}`).join(", ");

function addCard(name) {
  const title = element("h2", { id: `model-${name}` }, name);
  const figures = element("dl", { class: "figures" });
  const rows = element("tbody");
  const heads = COLUMNS.map((column) => element("th", { scope: "col" }, column));
  const table = element("table", {}, element("caption", {}, `Replicas of ${name}`), element("thead", {}, element("tr", {}, ...heads)), rows);
  byId("models").append(
    element("article", { class: "card", "aria-labelledby": title.id }, title, figures, element("div", { class: "scroll" }, table)),
  );
  cards.set(name, { figures, rows, curves: {} });
  return cards.get(name);
}

function renderModel(model, { figures, rows, curves }) {
  const { ok = 0, ...errors } = model.last_minute.outcomes;
  const shown = {
    "Task": known(model.task),
    "Engine": model.engine ? `${model.engine}, ${model.precision}, ${model.device}` : UNKNOWN,
    "Version": known(model.version?.slice(0, 12)),
    "Replicas": `${model.load.replicas} of ${known(model.target)}`,
    "Waiting": model.load.waiting,
    "In flight": model.load.in_flight,
    "p50 / p95 / p99": percentiles(model.last_minute.latency_ms),
    "Answered": ok,
    "Errors": Object.entries(errors).map(([code, count]) => `${count} ${code}`).join(", ") || "none",
    "Deaths": deaths(model.deaths),
  };
  const followed = { "Replicas": model.load.replicas, "Waiting": model.load.waiting, "p50 / p95 / p99": model.last_minute.latency_ms.p95 ?? 0 };
  figures.replaceChildren(...Object.entries(shown).map(([name, value]) => element("div", {},
    element("dt", {}, name), element("dd", {}, String(value)), ...(name in followed ? [curve(curves, name, followed[name])] : []))));
  rows.replaceChildren(...model.replicas.map((replica) => replicaRow(replica, model.reserved)));
}

function replicaRow({ id, state, node, vitals }, { num_cpus, num_gpus }) {
  return row(
    id,
    stated(state),
    known(node),
    `${num_cpus} CPU, ${num_gpus} GPU`,
    megabytes(vitals?.memory_bytes),
    vitals ? megabytes(vitals.gpu_peak_bytes, "none") : UNKNOWN,
    vitals ? vitals.batches.slice(-8).join(" ") || "none yet" : UNKNOWN,
  );
}

const stated = (state) => element("span", { class: `state-${state}` }, state);

/** How a figure went while somebody looked; for eyes only, the figure itself is text. */
function curve(curves, name, value) {
  const values = (curves[name] = [...(curves[name] ?? []), value].slice(-MOST_POINTS));
  const top = Math.max(...values, 1);
  const svg = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "polyline");
  for (const [key, set] of Object.entries({ viewBox: `0 0 ${MOST_POINTS - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" })) {
    svg.setAttribute(key, set);
  }
  line.setAttribute("points", values.map((each, index) => `${index + MOST_POINTS - values.length},${19 - 18 * each / top}`).join(" "));
  svg.append(line);
  return svg;
}

const known = (value) => value ?? UNKNOWN;
const megabytes = (bytes, without = UNKNOWN) => (bytes == null ? without : `${Math.round(bytes / 1e6)} MB`);
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString();
const percentiles = ({ p50, p95, p99 }) =>
  p50 == null ? "no answers" : `${[p50, p95, p99].map((each) => each.toFixed(0)).join(" / ")} ms`;
const deaths = ({ count, latest }) => (count ? `${count}, the last at ${clock(latest.at(-1).seen_at)}` : "none seen");

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** Sentences for what differs between two reports. */
function changes(old, now) {
  return now.models.flatMap((model) => {
    const was = old.models.find(({ name }) => name === model.name);
    return was ? modelChanges(was, model).map((change) => `${model.name}: ${change}`) : [];
  });
}

function newDeaths(report) {
  return report.models.flatMap(({ name, deaths }) => deaths.latest
    .filter(({ actor }) => !mourned.has(actor))
    .map(({ actor, node }) => {
      mourned.add(actor);
      return `${name}: a replica died on ${node ?? "an unknown node"}`;
    }));
}

function modelChanges(was, model) {
  const states = new Map(was.replicas.map(({ id, state }) => [id, state]));
  const found = [];
  if (model.target !== was.target) found.push(`${known(model.target)} replicas are wanted now, not ${known(was.target)}`);
  for (const { id, state } of model.replicas) {
    if (!states.has(id)) found.push(`replica ${id} is new: ${state}`);
    else if (states.get(id) !== state) found.push(`replica ${id} was ${states.get(id)}, is ${state}`);
    states.delete(id);
  }
  return [...found, ...[...states.keys()].map((id) => `replica ${id} is gone`)];
}

function tell(change) {
  const events = byId("events");
  events.prepend(element("li", {}, element("time", {}, new Date().toLocaleTimeString()), change));
  while (events.children.length > MOST_EVENTS) events.lastChild.remove();
}

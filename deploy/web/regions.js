/**
 * Lines and zones over the picture: dragged, or moved with the arrow keys; counted at by the fleet.
 *
 *     points ─ a person moves one ─→ {"lines": {…}, "zones": {…}} ─ PUT ─→ the stream ─→ counts ─→ labels and table
 *
 * Points are pixels of the frames that are sent, as are the drawing's: its viewBox is the frame.
 */

import { byId, row } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEY_STEP = 0.02; // of the frame's longer side
const RADIUS = 0.009; // of a handle, the same
const LETTERS = 0.022;
const drawing = byId("regions");
const shapes = new Map(); // name → its points: two of a line, more of a zone
let size = [0, 0];
let counts = {};
let changed = () => {};
let added = 0; // names are not used twice

/** Call ``tell`` whenever a person has changed something. */
export function onChange(tell) {
  changed = tell;
}

/** What the fleet is told. */
export function current() {
  const told = { lines: {}, zones: {} };
  for (const [name, points] of shapes) told[points.length === 2 ? "lines" : "zones"][name] = points;
  return told;
}

/** A new stream begins: nothing is left of the one before. */
export function reset() {
  shapes.clear();
  counts = {};
  size = [0, 0];
  allow(false);
  redraw();
  tabulate();
}

/** Where there is no frame yet, there is nowhere to put a line. */
function allow(known) {
  byId("add-line").disabled = byId("add-zone").disabled = !known;
}

/** Follow the latest frame's size and counts. */
export function update(width, height, latest) {
  counts = latest;
  if (width !== size[0] || height !== size[1]) {
    size = [width, height];
    allow(true);
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    redraw();
  }
  for (const label of drawing.querySelectorAll("text")) label.textContent = labelled(label.dataset.name);
  tabulate();
}

const total = (names = {}) => Object.values(names).reduce((sum, count) => sum + count, 0);
const labelled = (name) => {
  const { in: came = {}, out = {}, inside } = counts[name] ?? {};
  return `${name}: in ${total(came)}, out ${total(out)}${inside ? `, inside ${total(inside)}` : ""}`;
};

function tabulate() {
  const told = (names) => {
    const parts = Object.entries(names ?? {}).map(([name, count]) => `${count} ${name}`);
    return names == null ? "" : parts.join(", ") || "0";
  };
  byId("crossings").hidden = !Object.keys(counts).length;
  byId("crossing-rows").replaceChildren(
    ...Object.entries(counts).map(([name, ways]) => row(name, told(ways.in), told(ways.out), told(ways.inside))),
  );
}

function redraw() {
  drawing.replaceChildren(...[...shapes].flatMap(([name, points]) => shape(name, points)));
  byId("clear-regions").disabled = !shapes.size;
}

function shape(name, points) {
  const unit = Math.max(...size);
  const path = make("path", { d: `M${points.map((point) => point.join(" ")).join("L")}${points.length > 2 ? "Z" : ""}` });
  const middle = [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
  const label = make("text", { x: middle[0], y: middle[1] - 1.2 * RADIUS * unit, "font-size": LETTERS * unit });
  label.dataset.name = name;
  label.textContent = labelled(name);
  const handles = points.map((point, index) => handle(name, points, index, RADIUS * unit));
  return [path, label, ...handles];
}

function handle(name, points, index, radius) {
  const [x, y] = points[index].map(Math.round);
  const made = make("circle", {
    cx: x, cy: y, r: radius, tabindex: 0, role: "button",
    "aria-label": `${name}, point ${index + 1} of ${points.length} at ${x}, ${y}: arrow keys move it`,
  });
  made.id = `${name}-${index}`;
  made.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    move(points, index, [0, 1].map((axis) => points[index][axis] + step[axis] * KEY_STEP * Math.max(...size)));
    byId(made.id).focus();
    changed();
  });
  made.addEventListener("pointerdown", (event) => drag(event, points, index));
  return made;
}

function drag(event, points, index) {
  event.preventDefault();
  const done = new AbortController();
  const follow = ({ clientX, clientY }) => {
    const { left, top, width, height } = drawing.getBoundingClientRect();
    move(points, index, [(clientX - left) / width * size[0], (clientY - top) / height * size[1]]);
  };
  const release = () => { done.abort(); changed(); };
  window.addEventListener("pointermove", follow, { signal: done.signal });
  window.addEventListener("pointerup", release, { signal: done.signal });
  window.addEventListener("pointercancel", release, { signal: done.signal });
}

function move(points, index, place) {
  points[index] = place.map((value, axis) => Math.round(Math.min(Math.max(value, 0), size[axis])));
  redraw();
}

function make(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function add(kind, places) {
  added += 1;
  const name = `${kind} ${added}`;
  shapes.set(name, places.map(([x, y]) => [Math.round(x * size[0]), Math.round(y * size[1])]));
  redraw();
  byId(`${name}-0`).focus();
  changed();
}

byId("add-line").addEventListener("click", () => add("line", [[0.5, 0.08], [0.5, 0.92]]));
byId("add-zone").addEventListener("click", () => add("zone", [[0.3, 0.25], [0.7, 0.25], [0.7, 0.75], [0.3, 0.75]]));
byId("clear-regions").addEventListener("click", () => {
  shapes.clear();
  redraw();
  changed();
});

/** The view "Image": pictures in; what was found drawn, listed, and ready to be copied. */

import { Refused, apiKey, ask } from "./api.js";
import { byId, element, problem, row } from "./dom.js";
import { colour, corners, drawResults, resize } from "./draw.js";

const DEBOUNCE_MS = 150;
const canvas = byId("picture");
let file = null; // the chosen one
let pixels = null; // its ImageBitmap; null where this browser cannot decode it
let answer = null;
let asking = new AbortController(); // the newest request; what is older is of no interest
let pause;

export const visible = () => {};

/** The form of a request as it stands now. */
function fields() {
  return { conf: byId("conf").value, iou: byId("iou").value, model: byId("model").value };
}

async function query() {
  if (!file) return;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const body = new FormData();
  body.append("file", file, file.name);
  Object.entries(fields()).forEach(([name, value]) => value && body.append(name, value));
  try {
    const found = await ask("predict", { method: "POST", body, signal });
    if (!signal.aborted) render(found);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) throw error;
    byId("image-result").hidden = true;
    problem("image-problem", `${file.name}: ${error.message}`);
  }
}

function render(found) {
  answer = found;
  const [{ shape: [height, width], results, speed }] = found.images;
  problem("image-problem");
  byId("image-result").hidden = false;
  byId("drop").hidden = true;
  resize(canvas, width, height);
  const context = canvas.getContext("2d");
  if (pixels) context.drawImage(pixels, 0, 0, width, height);
  drawResults(context, results);
  canvas.setAttribute("aria-label", `${file.name} with ${sentence(results)}`);
  const took = Object.values(speed).reduce((sum, part) => sum + part, 0);
  byId("image-summary").textContent =
    `${sentence(results)}; ${found.metadata.model}, ${width} x ${height} pixels, ${took.toFixed(1)} ms`;
  byId("results").replaceChildren(...results.map(resultRow));
  byId("copied").textContent = "";
  byId("copy-text").hidden = true;
}

function sentence(results) {
  const counts = new Map();
  for (const { name } of results) counts.set(name, (counts.get(name) ?? 0) + 1);
  return [...counts].map(([name, count]) => `${count} ${name}`).join(", ") || "nothing found";
}

function resultRow(result) {
  const swatch = element("span", { class: "swatch" });
  swatch.style.background = colour(result.class);
  const where = corners(result).map((corner) => corner.map(Math.round).join(",")).join(" ");
  return row(element("span", {}, swatch, result.name), result.confidence.toFixed(3), where || "whole image");
}

/** Take the files that a person has given, and show the first. */
function take(files) {
  if (!files.length) return;
  byId("chosen").replaceChildren(...files.map((given) => {
    const button = element("button", { "aria-pressed": "false" }, given.name);
    button.addEventListener("click", () => select(given, button));
    return element("li", {}, button);
  }));
  byId("chosen").hidden = files.length === 1;
  select(files[0], byId("chosen").querySelector("button"));
}

async function select(given, button) {
  file = given;
  byId("chosen").querySelectorAll("button").forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
  if (given.type.startsWith("video/")) {
    byId("image-result").hidden = true;
    problem("image-problem", `${given.name} is a video: open it in the view 'Camera or video'.`);
    file = null;
    return;
  }
  const decoded = await createImageBitmap(given).catch(() => null); // the fleet reads more formats than browsers do
  if (file !== given) return;
  pixels = decoded;
  await query();
}

async function trySample() {
  const response = await fetch("web/sample.jpg");
  take([new File([await response.blob()], "sample.jpg", { type: "image/jpeg" })]);
}

const TEXTS = {
  curl: () => {
    const form = Object.entries(fields()).map(([name, value]) => `-F ${name}=${value}`).join(" ");
    const key = apiKey() ? "-H 'x-api-key: YOUR-KEY' " : ""; // a key does not belong into clipboards
    return `curl ${key}-F ${quoted(`file=@${file.name}`)} ${form} ${new URL("predict", document.baseURI)}`;
  },
  python: () => {
    const header = apiKey() ? ', headers={"x-api-key": "YOUR-KEY"}' : "";
    return [
      "import httpx",
      "",
      `with open(${JSON.stringify(file.name)}, "rb") as image:`,
      `    answer = httpx.post("${new URL("predict", document.baseURI)}", files={"file": image}, data=${JSON.stringify(fields())}${header})`,
      'print(answer.raise_for_status().json()["images"][0]["results"])',
    ].join("\n");
  },
  json: () => JSON.stringify(answer, null, 2),
};

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

async function copy(kind) {
  const text = TEXTS[kind]();
  byId("copy-text").textContent = text;
  byId("copy-text").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = "Copied.";
  } catch {
    byId("copied").textContent = "This browser does not let the page copy: select the text below.";
  }
}

function requery() {
  for (const id of ["conf", "iou"]) byId(id).nextElementSibling.textContent = Number(byId(id).value).toFixed(2);
  clearTimeout(pause);
  pause = setTimeout(query, DEBOUNCE_MS);
}

function onDrop(event) {
  event.preventDefault();
  byId("image").classList.remove("over");
  take([...event.dataTransfer.files]);
}

function onPaste(event) {
  if (!byId("image").hidden) take([...event.clipboardData.files]);
}

["conf", "iou", "model"].forEach((id) => byId(id).addEventListener("input", requery));
byId("files").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("sample").addEventListener("click", trySample);
byId("image").addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("image").classList.add("over");
});
byId("image").addEventListener("dragleave", () => byId("image").classList.remove("over"));
byId("image").addEventListener("drop", onDrop);
document.addEventListener("paste", onPaste);
document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button.dataset.copy)));

/**
 * The view "Camera or video": frames go over a websocket, several at once, and come back in order with track ids.
 *
 *     video ─ a frame ─→ JPEG ─→ {"frame": 12, "time_s": 0.48} + bytes ─→ fleet
 *     canvas ←─ that very frame, boxes, trails ←─ {"frame": 12, "dropped": 3, "image": {…}} ←─┘
 */

import { Refused, ask, socketAddress } from "./api.js";
import { byId, problem, row } from "./dom.js";
import { colour, corners, drawResults, drawTrail, resize } from "./draw.js";
import { atWork } from "./fleet.js";
import * as regions from "./regions.js";

const IN_FLIGHT = 3;
const LONGEST_SIDE = 1280; // of a frame that is sent, pixels
const QUALITY = 0.8;
const TRAIL = 40; // places of a track that are drawn
const RETRY_MS = 1000;
const TRIES = 5; // in a row without an answer
const video = byId("source");
const canvas = byId("tracked");
let run = null;
let known = false; // that this fleet has streams

/** One source from start to stop. */
class Run {
  id = `page-${[...crypto.getRandomValues(new Uint8Array(6))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  query = { model: byId("model").value, tracker: byId("tracker").value, mode: byId("mode").value, conf: byId("conf").value };
  socket = null;
  frame = 0;
  sent = new Map(); // frame number → the canvas that was sent
  encoding = Promise.resolve(); // one after the other, so that frames are sent in order
  skipped = 0;
  answered = 0;
  moments = []; // of the last second's answers
  trails = new Map(); // track id → places
  tracks = new Map(); // class name → track ids seen
  tries = 0;
  refusal = "The fleet does not take this stream: see its log, or try another model."; // until it says why
  ended = false; // no frame comes any more
}

export async function visible(seen) {
  atWork(seen);
  if (!seen || known) return;
  problem("stream-problem"); // before it asks: what is said meanwhile stays
  try {
    await ask("streams");
    known = true;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    problem("stream-problem", error.status === 404 ? "This fleet has no streams: images only." : error.message);
  }
  byId("camera").disabled = byId("video-file").disabled = !known;
}

async function start(open) {
  stop();
  problem("stream-problem");
  const mine = (run = new Run());
  byId("stop").disabled = false;
  try {
    await open();
    await video.play();
  } catch (error) {
    if (run === mine) finish("");
    problem("stream-problem", explained(error));
    return;
  }
  if (run !== mine) return;
  byId("stream-result").hidden = false;
  byId("stream-empty").hidden = true;
  regions.reset();
  connect(mine);
  nextFrame(mine);
}

function explained(error) {
  if (error.name === "NotAllowedError") return "The browser does not let this page use the camera: allow it, then try again.";
  if (error.name === "NotFoundError") return "There is no camera here: choose a video instead.";
  if (error.name === "InsecureContext") return error.message;
  return "This browser cannot play that file: choose an MP4 or WebM video.";
}

async function openCamera() {
  if (!navigator.mediaDevices) {
    throw new DOMException("Browsers open the camera on https:// or 127.0.0.1 only.", "InsecureContext");
  }
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
}

function connect(mine) {
  const socket = (mine.socket = new WebSocket(socketAddress(`streams/${mine.id}`, { ...mine.query })));
  socket.addEventListener("open", () => say("Connected."));
  socket.addEventListener("message", ({ data }) => run === mine && receive(mine, JSON.parse(data)));
  socket.addEventListener("close", () => run === mine && reconnect(mine));
}

/** Under the same id, so that tracks go on. */
function reconnect(mine) {
  mine.sent.clear();
  mine.tries += 1;
  if (mine.ended) return finish("The video has ended.");
  if (mine.tries > TRIES) {
    finish("");
    return problem("stream-problem", mine.refusal);
  }
  say("The connection was lost: trying again.");
  setTimeout(() => run === mine && connect(mine), RETRY_MS);
}

function nextFrame(mine) {
  video.requestVideoFrameCallback((_, { mediaTime }) => {
    if (run !== mine) return;
    nextFrame(mine);
    mine.frame += 1;
    if (mine.socket.readyState === WebSocket.OPEN && mine.sent.size < IN_FLIGHT) send(mine, mine.frame, mediaTime);
    else mine.skipped += 1;
    if (mustWait(mine)) video.pause();
  });
}

/** A file of which all frames are wanted waits for the fleet; a camera cannot. */
const mustWait = (mine) => mine.query.mode === "all" && !video.srcObject && mine.sent.size >= IN_FLIGHT;

function send(mine, frame, time_s) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(video.videoWidth, video.videoHeight));
  const picture = document.createElement("canvas");
  picture.width = Math.round(video.videoWidth * scale);
  picture.height = Math.round(video.videoHeight * scale);
  picture.getContext("2d").drawImage(video, 0, 0, picture.width, picture.height);
  mine.sent.set(frame, picture);
  const { socket } = mine;
  mine.encoding = mine.encoding.then(async () => {
    const jpeg = await new Promise((resolve) => picture.toBlob(resolve, "image/jpeg", QUALITY));
    if (socket.readyState !== WebSocket.OPEN) return;
    socket.send(JSON.stringify({ frame, time_s }));
    socket.send(jpeg);
  });
}

function receive(mine, { frame, error, image, dropped, counts }) {
  const picture = mine.sent.get(frame);
  for (const number of [...mine.sent.keys()]) if (number <= frame) mine.sent.delete(number); // older ones were dropped
  if (error) problem("stream-problem", (mine.refusal = error.message));
  else {
    problem("stream-problem");
    follow(mine, image.results);
    draw(mine, image, picture);
    figures(mine, image.results, dropped);
    regions.update(image.shape[1], image.shape[0], counts);
  }
  if (mine.ended && !mine.sent.size) return finish("The video has ended.");
  if (!mine.ended && video.paused && !mustWait(mine)) video.play();
}

function follow(mine, results) {
  const now = performance.now();
  mine.tries = 0;
  mine.answered += 1;
  mine.moments = [...mine.moments.filter((moment) => now - moment < 1000), now];
  for (const result of results.filter(({ track_id }) => track_id != null)) {
    const trail = mine.trails.get(result.track_id) ?? [];
    mine.trails.set(result.track_id, [...trail, middle(result)].slice(-TRAIL));
    mine.tracks.set(result.name, (mine.tracks.get(result.name) ?? new Set()).add(result.track_id));
  }
}

/** The centre of an object's box, which is what passes lines. */
function middle(result) {
  const points = corners(result);
  return [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
}

function draw(mine, { shape: [height, width], results }, picture) {
  resize(canvas, width, height);
  const context = canvas.getContext("2d");
  if (picture) context.drawImage(picture, 0, 0, width, height);
  drawResults(context, results, (result) => result.track_id ?? result.class);
  for (const { track_id } of results) {
    if (track_id != null) drawTrail(context, mine.trails.get(track_id), colour(track_id));
  }
  canvas.setAttribute("aria-label", `The latest frame, with ${results.length} objects`);
}

function figures(mine, results, dropped) {
  byId("fps").textContent = String(mine.moments.length);
  byId("answered").textContent = String(mine.answered);
  byId("dropped").textContent = String(dropped);
  byId("skipped").textContent = String(mine.skipped);
  const inView = (name) => results.filter((result) => result.name === name).length;
  const names = new Set([...mine.tracks.keys(), ...results.map(({ name }) => name)]);
  byId("counts").replaceChildren(
    ...[...names].sort().map((name) => row(name, String(inView(name)), String(mine.tracks.get(name)?.size ?? 0))),
  );
}

function finish(sentence) {
  const { socket } = run;
  run = null;
  socket?.close();
  video.pause();
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  if (video.src) {
    URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
  }
  byId("stop").disabled = true;
  say(sentence);
}

/** Tell the stream where to count; it answers with the next frames. */
async function countAt() {
  if (!run) return;
  const options = { method: "PUT", body: JSON.stringify(regions.current()) };
  try {
    await ask(`streams/${run.id}/regions`, options, { "content-type": "application/json" });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    problem("stream-problem", error.message);
  }
}

const stop = () => run && finish("Stopped.");
const say = (sentence) => { byId("stream-status").textContent = sentence; };

regions.onChange(countAt);
byId("camera").addEventListener("click", () => start(openCamera));
byId("video-file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) start(async () => { video.src = URL.createObjectURL(file); });
  target.value = "";
});
byId("stop").addEventListener("click", stop);
video.addEventListener("ended", () => {
  if (!run) return;
  run.ended = true;
  if (!run.sent.size) finish("The video has ended.");
});

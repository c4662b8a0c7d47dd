/** What was found → a canvas: boxes, oriented boxes, outlines, skeletons, classes. Coordinates are the image's pixels. */

const LIMBS = [ // between COCO's 17 points, numbered from 0
  [15, 13], [13, 11], [16, 14], [14, 12], [11, 12], [5, 11], [6, 12], [5, 6], [5, 7], [6, 8], [7, 9], [8, 10],
  [1, 2], [0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6],
];
const VISIBLE = 0.5;

/** A colour for a class or a track; neighbours differ. */
export const colour = (number, alpha = 1) => `oklch(56% 0.19 ${(number * 137.5 + 190) % 360} / ${alpha})`;

/** The corners of a detection's box, plain or oriented, as [x, y] pairs; none for a classification. */
export function corners({ box }) {
  if (!box) return [];
  if ("x3" in box) return [1, 2, 3, 4].map((n) => [box[`x${n}`], box[`y${n}`]]);
  return [[box.x1, box.y1], [box.x2, box.y1], [box.x2, box.y2], [box.x1, box.y2]];
}

/**
 * Draw detections over what the canvas shows.
 * @param {CanvasRenderingContext2D} context
 * @param {Array<object>} results as the fleet's `results`
 * @param {(result: object) => number} key what the colour follows
 */
export function drawResults(context, results, key = (result) => result.class) {
  const thickness = Math.max(2, Math.round(Math.min(context.canvas.width, context.canvas.height) / 250));
  context.lineWidth = thickness;
  context.font = `600 ${8 + 3 * thickness}px system-ui, sans-serif`;
  context.textBaseline = "top";
  let unplaced = 0;
  for (const result of results) {
    const tint = colour(key(result));
    if (result.segments) fill(context, pairs(result.segments), colour(key(result), 0.35));
    outline(context, corners(result), tint);
    if (result.keypoints) skeleton(context, result.keypoints, tint, thickness);
    const [x, y] = result.box ? highest(corners(result)) : [0, (unplaced++ + 1) * (12 + 4 * thickness)];
    label(context, caption(result), x, y, tint);
  }
}

const caption = (result) =>
  [result.track_id == null ? "" : `#${result.track_id}`, result.name, result.confidence.toFixed(2)].filter(Boolean).join(" ");

/** A line through earlier places, fading with age. */
export function drawTrail(context, places, tint) {
  context.strokeStyle = tint;
  places.slice(1).forEach(([x, y], index) => {
    context.globalAlpha = (index + 1) / places.length;
    context.beginPath();
    context.moveTo(...places[index]);
    context.lineTo(x, y);
    context.stroke();
  });
  context.globalAlpha = 1;
}

/** Give a canvas its picture's size; the stage around it takes the shape. */
export function resize(canvas, width, height) {
  [canvas.width, canvas.height] = [width, height];
  canvas.parentElement.style.setProperty("--ratio", width / height);
}

const pairs = ({ x, y }) => x.map((each, index) => [each, y[index]]);
const highest = (points) => points.reduce((best, point) => (point[1] < best[1] ? point : best));

function trace(context, points) {
  context.beginPath();
  points.forEach(([x, y]) => context.lineTo(x, y));
  context.closePath();
}

function outline(context, points, tint) {
  trace(context, points);
  context.strokeStyle = tint;
  context.stroke();
}

function fill(context, points, tint) {
  trace(context, points);
  context.fillStyle = tint;
  context.fill();
}

function skeleton(context, keypoints, tint, thickness) {
  const points = pairs(keypoints);
  const seen = (index) => (keypoints.visible?.[index] ?? 1) > VISIBLE;
  context.strokeStyle = context.fillStyle = tint;
  for (const [from, to] of points.length === 17 ? LIMBS : []) {
    if (seen(from) && seen(to)) outline(context, [points[from], points[to]], tint);
  }
  points.filter((_, index) => seen(index)).forEach(([x, y]) => {
    context.beginPath();
    context.arc(x, y, 1.5 * thickness, 0, 2 * Math.PI);
    context.fill();
  });
}

function label(context, text, x, y, tint) {
  const height = parseFloat(context.font.split(" ")[1]) + 4;
  const width = context.measureText(text).width + 8;
  const left = Math.max(0, Math.min(x, context.canvas.width - width));
  const top = Math.max(0, y - height);
  context.fillStyle = tint;
  context.fillRect(left, top, width, height);
  context.fillStyle = "#fff";
  context.fillText(text, left + 4, top + 2);
}

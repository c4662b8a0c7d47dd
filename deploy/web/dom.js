/** Building pieces of the page. Data becomes text, never markup. */

export const byId = (id) => document.getElementById(id);

/**
 * An element with attributes and children; texts among them stay texts.
 * @param {string} tag
 * @param {Object<string, string>} attributes
 * @param {...(Node|string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A table row of cells, of which the first is the row's header. */
export const row = (first, ...cells) =>
  element("tr", {}, element("th", { scope: "row" }, first), ...cells.map((cell) => element("td", {}, cell)));

/** Tell, or with no message no longer tell, what is wrong. */
export function problem(id, message = "") {
  const place = byId(id);
  place.hidden = !message;
  if (place.textContent !== message) place.textContent = message; // said once by a screen reader, not at every poll
}

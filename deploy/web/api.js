/** Asking the fleet: one kind of error, and the API key where one is needed. */

import { byId } from "./dom.js";

const KEY = "yolofleet-api-key";
let beingAsked = null; // the open dialog's promise: one dialog, however many requests were refused

/** What the fleet refused, or that it did not answer; its message is for people. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY);

/** Fetch a path of this fleet and read its JSON; an empty answer is an empty object. */
export async function ask(path, options = {}, headers = {}) {
  const key = apiKey();
  const response = await reach(path, { ...options, headers: key ? { ...headers, "x-api-key": key } : headers });
  if (response.status === 401) {
    if (apiKey() === key) await askForKey();
    return ask(path, options, headers);
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, body.error?.message ?? `The fleet answered ${response.status}`);
  return body;
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The fleet does not answer: is it still running, and can this browser reach it?");
  }
}

function askForKey() {
  beingAsked ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    const done = new AbortController();
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("key").value);
      dialog.close();
      resolve();
    }, done);
    dialog.addEventListener("cancel", () => reject(new Refused(401, "This fleet asks for an API key.")), done);
    dialog.addEventListener("close", () => { done.abort(); beingAsked = null; }, { once: true });
    dialog.showModal();
  });
  return beingAsked;
}

/** The address of a websocket beside this page. Browsers send no headers with one, so the key goes into the query. */
export function socketAddress(path, query) {
  const address = new URL(path, document.baseURI);
  address.protocol = address.protocol.replace("http", "ws");
  if (apiKey()) query.api_key = apiKey();
  address.search = new URLSearchParams(Object.entries(query).filter(([, value]) => value)); // no model before they are listed
  return address;
}

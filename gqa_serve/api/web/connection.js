// Whether the server can answer, and as which model; the header shows it. Asks until the answer is yes, and again
// whenever somebody met an error. Opens the dialog for a key where the server wants one.

import { ApiError, getJson, getKey, setKey } from "./api.js";
import { byId, setText } from "./dom.js";

const AGAIN_MS = 2000;

/** Called with the model's name when the server turns out to be there. */
const listeners = [];
let model = null;
let timer = 0;

export const currentModel = () => model;
export const onReady = (listener) => listeners.push(listener);

/** @param {"wait" | "ready" | "bad"} kind @param {string} text */
function show(kind, text) {
  byId("connection").dataset.kind = kind;
  setText(byId("connection-text"), text);
}

/** Ask now, and every two seconds until the server can answer. */
export async function connect() {
  clearTimeout(timer);
  try {
    await getJson("ready");
    model = (await getJson("v1/models")).data[0].id;
    setText(byId("model-name"), model);
    byId("model-name").title = model;
    show("ready", "ready");
    for (const listener of listeners) listener(model);
  } catch (error) {
    met(error);
  }
}

/**
 * Somebody met this error: show it if it concerns the server as a whole, and find out when it is over.
 * @param {unknown} error
 */
export function met(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) {
    show("bad", "wants an API key");
    byId("key-button").hidden = false;
    if (!byId("key-dialog").open) askKey(error.message);
    return;
  }
  if (error.status !== 503 && error.status !== 0) return;
  show(error.status ? "wait" : "bad", error.status ? error.message : "cannot be reached");
  clearTimeout(timer);
  timer = setTimeout(connect, AGAIN_MS);
}

function askKey(message) {
  setText(byId("key-text"), message);
  byId("key").value = getKey();
  byId("key-dialog").showModal();
  byId("key").focus();
}

export function setUpKey() {
  const dialog = byId("key-dialog");
  byId("key-button").hidden = !getKey();
  byId("key-button").addEventListener("click", () => askKey("The key that this page sends."));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("key").value.trim());
    dialog.close();
    connect();
  });
}

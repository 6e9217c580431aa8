// Talks to the server this page came from. Every address is relative, so that a path prefix changes nothing.
// Errors are the server's own words; the key lives in this tab's session storage and goes nowhere else.

const KEY = "gqa-serve-key";

/** What went wrong, in words for people: the server's if it said any. */
export class ApiError extends Error {
  /** @param {string} message @param {{status?: number, param?: ?string, retryAfter?: ?number}} [details] */
  constructor(message, details = {}) {
    super(message);
    this.status = details.status || 0;
    this.param = details.param || null;
    this.retryAfter = details.retryAfter || null;
  }
}

export const getKey = () => { try { return sessionStorage.getItem(KEY) || ""; } catch { return memory; } };
let memory = "";  // where storage is switched off

export function setKey(value) {
  memory = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch { /* kept in memory */ }
}

/** A response that is not an error. Throws ApiError, or AbortError if `signal` says so. */
async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = getKey();
  if (key) headers.Authorization = "Bearer " + key;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running? This page tries again by itself.");
  }
  if (response.ok) return response;
  throw await errorOf(response);
}

/** @param {Response} response */
async function errorOf(response) {
  const details = { status: response.status, retryAfter: Number(response.headers.get("Retry-After")) || null };
  try {
    const body = await response.json();
    return new ApiError(body.error.message, { ...details, param: body.error.param });
  } catch {
    return new ApiError(`The server answered with status ${response.status} and no explanation.`, details);
  }
}

/** @param {string} path @param {AbortSignal} [signal] */
export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

/** @param {string} path @param {AbortSignal} [signal] */
export async function getText(path, signal) {
  return (await request(path, { signal })).text();
}

/**
 * The chunks of a chat completion as they come. Aborting `signal` closes the connection, which ends the
 * request in the engine. Throws ApiError, also for an error in mid-stream.
 * @param {object} body @param {AbortSignal} signal
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { status: response.status, param: chunk.error.param });
    yield chunk;
  }
  throw new ApiError("The connection broke before the answer was complete. Regenerate to ask again.");
}

/** The data of server-sent events. Comments, which keep a connection alive, are passed over. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) { yield data.join("\n"); data = []; }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw error instanceof ApiError ? error : new ApiError("The connection broke: " + error.message);
  } finally {
    reader.cancel().catch(() => {});  // it may be closed already
  }
}

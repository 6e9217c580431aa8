// The messages of the conversation and their life in this tab: added, cut back, stored, found again after a
// reload. Knows nothing of how they look.

const STORE = "gqa-serve-conversation";

/**
 * @typedef {{text: string, logprob: number, top: [string, number][]}} Token
 * @typedef {{role: "user" | "assistant", content: string, reasoning?: string, tokens?: Token[],
 *   usage?: {prompt: number, cached: number, output: number}, first_s?: number, rate?: ?number,
 *   finish?: string, error?: {message: string, retryAfter: ?number}}} Message
 */

/** @type {Message[]} */
let messages = [];

export const all = () => messages;
export const last = () => messages[messages.length - 1];

/** @param {Message} message */
export function add(message) {
  messages.push(message);
  return message;
}

/** Forgets the message at `index` and all after it. */
export function cutTo(index) {
  messages.length = index;
}

/** Where the last question is; -1 if there is none. */
export function lastQuestion() {
  for (let index = messages.length - 1; index >= 0; index -= 1) if (messages[index].role === "user") return index;
  return -1;
}

/**
 * The conversation as the API takes it. An answer that failed before it said anything is left out.
 * @param {string} system
 */
export function forRequest(system) {
  const turns = messages.filter((message) => message.role === "user" || message.content);
  const list = turns.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...list] : list;
}

/** Keeps the conversation for a reload; where it is too long for that, without the tokens' probabilities. */
export function store() {
  for (const kept of [messages, messages.map(({ tokens, ...message }) => message)]) {
    try {
      sessionStorage.setItem(STORE, JSON.stringify(kept));
      return;
    } catch { /* too long, or storage is switched off: the conversation lasts as long as the page */ }
  }
}

export function restore() {
  try {
    messages = JSON.parse(sessionStorage.getItem(STORE)) || [];
  } catch {
    messages = [];
  }
}

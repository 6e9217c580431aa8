// The chat: a question goes out, the answer grows on the screen, can be stopped, asked for again, or its question
// edited. Nothing here looks at a token twice: arrivals are collected and drawn once a frame.

import { ApiError, streamChat } from "./api.js";
import { connect, currentModel, met } from "./connection.js";
import * as conversation from "./conversation.js";
import { byId, el, setText } from "./dom.js";
import { AnswerView, questionView } from "./message.js";
import { markWrong, samplingFields, setUpSettings, systemPrompt } from "./settings.js";

const EXAMPLES = [
  "Explain grouped-query attention in three sentences.",
  "Write a haiku about memory.",
  "Why is the sky blue?",
];

/** The request under way. @type {?AbortController} */
let running = null;
/** Whether the composer holds the last question instead of a new one. */
let editing = false;

export function setUpChat() {
  setUpSettings();
  conversation.restore();
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("prompt").addEventListener("keydown", onKey);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("chat").hidden || byId("key-dialog").open) return;
    if (running) stop();
    else if (editing) endEditing();
  });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("cancel-edit").addEventListener("click", endEditing);
  window.addEventListener("pagehide", conversation.store);
  for (const text of EXAMPLES) {
    byId("examples").append(el("li", {}, el("button", { type: "button", click: () => { byId("prompt").value = text; submit(); } }, text)));
  }
  drawAll();
}

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
}

function submit() {
  const text = byId("prompt").value.trim();
  if (!text || running) return;
  if (editing) conversation.cutTo(conversation.lastQuestion());
  endEditing();
  byId("prompt").value = "";
  conversation.add({ role: "user", content: text });
  drawAll();
  answer();
}

function stop() {
  if (running) running.abort();
  byId("prompt").focus();
}

function clear() {
  stop();
  endEditing();
  conversation.cutTo(0);
  conversation.store();
  drawAll();
  announce("Conversation cleared.");
  byId("prompt").focus();
}

function edit() {
  const index = conversation.lastQuestion();
  if (index < 0 || running) return;
  editing = true;
  byId("editing").hidden = false;
  byId("prompt").value = conversation.all()[index].content;
  byId("prompt").focus();
}

function endEditing() {
  if (!editing) return;
  editing = false;
  byId("editing").hidden = true;
  byId("prompt").value = "";
  byId("prompt").focus();
}

function regenerate() {
  if (running || conversation.lastQuestion() < 0) return;
  endEditing();
  conversation.cutTo(conversation.lastQuestion() + 1);
  drawAll();
  answer();
  byId("prompt").focus();
}

/** Everything anew: after a reload, and whenever messages go. */
function drawAll() {
  const question = conversation.lastQuestion();
  const nodes = conversation.all().map((message, index) => {
    if (message.role === "user") {
      const node = questionView(message, edit);
      node.classList.toggle("last", index === question);
      return node;
    }
    const view = new AnswerView(message, regenerate);
    view.draw(false);
    view.node.classList.toggle("last", message === conversation.last());
    return view.node;
  });
  byId("messages").replaceChildren(...nodes);
  byId("empty").hidden = nodes.length > 0;
  byId("clear").hidden = !nodes.length;
  follow(true);
}

/** Asks for the answer to the conversation and lets it grow. */
async function answer() {
  const controller = running = new AbortController();
  markWrong(null);
  const body = {
    model: currentModel(), stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    ...samplingFields(), messages: conversation.forRequest(systemPrompt()),
  };
  if (!body.model) delete body.model;
  const message = conversation.add({ role: "assistant", content: "" });
  const view = new AnswerView(message, regenerate);
  view.node.classList.add("last");
  byId("messages").append(view.node);
  showRunning(true);
  announce("Answering.");
  const growing = new Growing(view);
  try {
    for await (const chunk of streamChat(body, controller.signal)) growing.take(chunk);
  } catch (error) {
    fail(message, error);
  } finally {
    running = null;
    growing.end();
    showRunning(false);
    conversation.store();
    announce(spoken(message));
  }
}

/** @param {import("./conversation.js").Message} message @param {unknown} error */
function fail(message, error) {
  if (error.name === "AbortError") {
    message.finish = "stopped";
    return;
  }
  message.finish = "failed";
  message.error = { message: error.message, retryAfter: error.retryAfter || null };
  if (!(error instanceof ApiError)) throw error;  // a fault of this page; the console shows where
  markWrong(error.param);
  met(error);
  if (error.status === 429 || error.status === 200) connect();  // in mid-stream: is the engine still there?
}

/** Puts chunks into a message and draws it, once a frame however many came. */
class Growing {
  constructor(view) {
    this.view = view;
    this.message = view.message;
    this.sent = performance.now();
    this.first = 0;
    this.frame = 0;
    view.draw(true);
    follow(true);
  }

  take(chunk) {
    const { message } = this;
    const choice = chunk.choices[0];
    if (chunk.usage) this.count(chunk.usage);
    if (choice) {
      message.content += choice.delta.content || "";
      if (choice.delta.reasoning_content) message.reasoning = (message.reasoning || "") + choice.delta.reasoning_content;
      if (choice.logprobs) this.addTokens(choice.logprobs.content);
      if (choice.finish_reason) message.finish = choice.finish_reason;
    }
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  count(usage) {
    const { message } = this;
    const now = performance.now();
    message.usage = {
      prompt: usage.prompt_tokens, cached: usage.prompt_tokens_details.cached_tokens, output: usage.completion_tokens,
    };
    if (!this.first && usage.completion_tokens) {
      this.first = now;
      this.atFirst = usage.completion_tokens;
      message.first_s = (now - this.sent) / 1000;
    }
    const later = usage.completion_tokens - this.atFirst;
    if (this.first && later > 0 && now > this.first && usage.completion_tokens !== this.counted) {
      this.counted = usage.completion_tokens;
      message.rate = later / ((now - this.first) / 1000);
    }
  }

  addTokens(entries) {
    const tokens = this.message.tokens || (this.message.tokens = []);
    for (const entry of entries) {
      tokens.push({ text: entry.token, logprob: entry.logprob, top: entry.top_logprobs.map((one) => [one.token, one.logprob]) });
    }
  }

  draw() {
    this.frame = 0;
    this.view.draw(true);
    follow(false);
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.view.draw(false);
    follow(false);
  }
}

function showRunning(is) {
  const log = byId("log");
  log.setAttribute("aria-busy", String(is));
  byId("chat").toggleAttribute("data-running", is);
  const focusLost = document.activeElement === byId(is ? "send" : "stop");
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  if (focusLost) byId("prompt").focus();
}

/** Keeps the end in sight, unless the reader has scrolled away from it. @param {boolean} always */
function follow(always) {
  const log = byId("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

/** Screen readers hear that an answer began, and the whole of it when it is there, not every token. */
function announce(text) {
  setText(byId("announcer"), text);
}

function spoken(message) {
  if (message.error) return "The answer failed. " + message.error.message;
  return (message.finish === "stopped" ? "Stopped. " : "Answer: ") + message.content;
}

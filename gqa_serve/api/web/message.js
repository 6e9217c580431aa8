// One message of the conversation on the screen: a question, or an answer that may still be growing. An answer
// has its thinking folded away, its text, its tokens coloured, what it cost, and its error if it has one.

import { brief, count, duration, el, setText } from "./dom.js";
import { copyText, renderInto } from "./markdown.js";
import { tokenView } from "./tokens.js";

/** @typedef {import("./conversation.js").Message} Message */

/** @param {Message} message @param {() => void} onEdit */
export function questionView(message, onEdit) {
  const text = el("p", { class: "text", dir: "auto" }, message.content);
  const edit = el("button", { type: "button", class: "plain edit", click: onEdit }, "Edit");
  return el("article", { class: "message user", "aria-label": "You" }, text, el("div", { class: "foot" }, edit));
}

export class AnswerView {
  /** @param {Message} message @param {() => void} onRegenerate */
  constructor(message, onRegenerate) {
    this.message = message;
    this.thinkingText = el("div", { class: "text", dir: "auto" });
    this.thinkingName = el("summary", {}, "Thinking");
    this.thinking = el("details", { class: "thinking", hidden: true }, this.thinkingName, this.thinkingText);
    this.text = el("div", { class: "text" });
    this.tokens = el("div", { hidden: true });
    this.error = el("p", { class: "error", hidden: true });
    this.stats = el("p", { class: "stats" });
    this.tokensButton = el("button", { type: "button", class: "plain", "aria-pressed": "false", hidden: true,
      click: () => this.showTokens(this.tokens.hidden) }, "Tokens");
    const copy = el("button", { type: "button", class: "plain", click: () => copyText(copy, message.content) }, "Copy");
    this.regenerate = el("button", { type: "button", class: "plain regenerate", click: onRegenerate }, "Regenerate");
    this.foot = el("div", { class: "foot" }, this.stats, this.tokensButton, copy, this.regenerate);
    this.node = el("article", { class: "message answer", "aria-label": "Answer" },
      this.thinking, this.text, this.tokens, this.error, this.foot);
  }

  /** Shows what the message holds now. @param {boolean} growing */
  draw(growing) {
    const { message } = this;
    this.node.toggleAttribute("data-growing", growing);
    this.node.setAttribute("aria-busy", String(growing));
    this.thinking.hidden = !message.reasoning;
    if (message.reasoning) {
      setText(this.thinkingText, message.reasoning.trim());
      setText(this.thinkingName, growing && !message.content ? "Thinking …" : "Thinking");
    }
    renderInto(this.text, message.content);
    this.tokensButton.hidden = growing || !message.tokens || !message.tokens.length;
    setText(this.stats, statistics(message, growing));
    this.error.hidden = !message.error;
    if (message.error) setText(this.error, message.error.message + again(message.error.retryAfter));
  }

  /** The text token by token instead of rendered, or back. @param {boolean} shown */
  showTokens(shown) {
    if (shown && !this.tokens.hasChildNodes()) this.tokens.append(tokenView(this.message.tokens));
    this.tokens.hidden = !shown;
    this.text.hidden = shown;
    this.tokensButton.setAttribute("aria-pressed", String(shown));
  }
}

const again = (seconds) => (seconds ? ` Try again in ${seconds} s.` : "");

const ENDS = { length: "cut at max tokens", stopped: "stopped", failed: "failed" };

/** What the answer cost, in one line. @param {Message} message */
function statistics(message, growing) {
  const parts = [];
  const { usage } = message;
  if (usage) {
    parts.push(`prompt ${count(usage.prompt)}` + (usage.cached ? ` (${count(usage.cached)} cached)` : ""));
    parts.push(`output ${count(usage.output)}`);
  }
  if (message.rate) parts.push(brief(message.rate) + " tok/s");
  if (message.first_s !== undefined) parts.push("first token " + duration(message.first_s));
  if (!growing && ENDS[message.finish]) parts.push(ENDS[message.finish]);
  return parts.join(" · ") || (growing ? "waiting for the first token …" : "");
}

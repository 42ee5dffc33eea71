// A conversation: its messages, what of them the service keeps, and the requests that follow.

import { ask } from "./api.js";
import { stream } from "./answer.js";
import { $, announce } from "./dom.js";
import { blame, fault, fields, systemPrompt } from "./settings.js";
import { status } from "./status.js";
import { conversations, open } from "./store.js";

/**
 * A message of the page.
 * @typedef {Object} Message
 * @property {string} role "user", "assistant" or "tool".
 * @property {string} content
 * @property {boolean} kept Whether the service's session has it.
 * @property {string} [id] Of the call that a tool's message answers.
 * @property {Object} [answer] What came beside an answer's text: reasoning, calls and figures.
 * @property {Error} [error] Why there is no answer.
 */

const NAME_LENGTH = 48;

export class Chat {
  /** @param {function} onchange Called when the list of messages has changed. */
  constructor(onchange) {
    this.onchange = onchange;
    this.running = null;
    this.begin(newId());
  }

  begin(id) {
    this.stop();
    this.id = id;
    /** @type {Message[]} */
    this.messages = [];
    this.keptSystem = "";
    this.keptAt = Date.now();
    // How many of the session's last messages are no longer the page's.
    this.replaced = 0;
  }

  startNew() {
    this.begin(newId());
    open.set(null);
    this.onchange();
  }

  /** Show a conversation that the service keeps. */
  async load(id) {
    this.begin(id);
    open.set(id);
    this.onchange();
    const session = await (await askSession(id)).json();
    if (this.id !== id) return;
    this.keptSystem = session.system || "";
    this.messages = session.messages.map(({ role, content }) => ({ role, content, kept: true }));
    this.onchange();
  }

  async remove(id) {
    try {
      await askSession(id, "DELETE");
    } catch (error) {
      if (error.code !== "session_not_found") throw error;
    }
    conversations.remove(id);
    if (this.id === id) this.startNew();
  }

  get isBusy() {
    return this.running !== null;
  }

  stop() {
    this.running?.abort();
  }

  /** Calls of the last answer that have no answers yet. */
  get openCalls() {
    const last = this.messages.at(-1);
    return last?.role === "assistant" && !last.error ? last.answer?.calls ?? [] : [];
  }

  send(text) {
    this.dropUnanswered();
    return this.ask([{ role: "user", content: text, kept: false }]);
  }

  answerCalls(results) {
    const calls = this.openCalls;
    return this.ask(calls.map((call, i) => ({ role: "tool", content: results[i], id: call.id, kept: false })));
  }

  /** Ask anew for the answer at this place; what follows it is replaced. */
  regenerate(place) {
    this.cut(place);
    return this.ask([], { anew: true });
  }

  edit(place, text) {
    this.cut(place);
    return this.send(text);
  }

  /** Remove the messages from this place on; the service keeps them until the next answer is complete. */
  cut(place) {
    const removed = this.messages.splice(place);
    this.replaced += removed.filter((m) => m.kept).length;
  }

  /** A question without an answer is not part of the conversation. */
  dropUnanswered() {
    if (this.messages.at(-1)?.error) this.messages.pop();
    if (this.messages.at(-1)?.role === "user") this.cut(this.messages.length - 1);
  }

  /** The request that asks for what follows the messages and `added`. */
  request(added, { anew = false } = {}) {
    this.checkKept();
    let sent = [...this.messages, ...added].filter((m) => !m.kept && !m.error);
    let replaced = this.replaced;
    if (!sent.length) {
      // The question is the session's last message: it takes the place of itself.
      const last = this.messages.findLastIndex((m) => m.role !== "assistant");
      sent = this.messages.slice(last < 0 ? 0 : firstOfRole(this.messages, last));
      replaced += sent.length;
    }
    const system = systemPrompt();
    const first = system || this.keptSystem ? [{ role: "system", content: system }] : [];
    const headers = keepsSessions() ? { "X-Session-ID": this.id } : {};
    if (replaced) headers["X-Session-Replace"] = String(replaced);
    return {
      path: "/v1/chat/completions",
      headers,
      body: {
        model: status?.model.name ?? "default",
        messages: [...first, ...sent.map(asSent)],
        ...fields({ chat: true }),
        ...(anew ? { cache: false } : {}),
        stream: true,
        stream_options: { include_usage: true },
      },
    };
  }

  /** A service that was started anew, or a long pause, has forgotten the session: all is sent again. */
  checkKept() {
    const { started = 0, sessions } = status ?? {};
    const age = Date.now() - this.keptAt;
    if (started < this.keptAt + 1000 && !(age > sessions?.ttl_seconds * 1000)) return;
    for (const message of this.messages) message.kept = false;
    this.replaced = 0;
    this.keptSystem = "";
  }

  async ask(added, options = {}) {
    const wrong = fault({ chat: true });
    const request = this.request(added, options);
    this.messages.push(...added);
    const said = { role: "assistant", content: "", kept: false, answer: null };
    this.messages.push(said);
    if (wrong) {
      said.error = new Error(wrong);
      this.onchange();
      return;
    }
    const running = (this.running = new AbortController());
    this.onchange();
    announce("The model answers");
    let partly = null;
    try {
      said.answer = await stream(request, running.signal, (answer) => {
        partly = answer;
        said.content = answer.text;
        said.show?.(answer);
      });
      this.keep(request);
      announce(`Answer: ${said.answer.text || "a call of a tool"}`);
    } catch (error) {
      this.fail(said, partly, error);
    } finally {
      if (this.running === running) this.running = null;
      this.onchange();
    }
  }

  /** The service's session now has all that the page shows. */
  keep(request) {
    if (request.headers["X-Session-ID"] !== this.id) return;
    this.keptAt = Date.now();
    for (const message of this.messages) message.kept = !message.error;
    this.keptSystem = systemPrompt();
    this.replaced = 0;
    const asked = this.messages.find((m) => m.role === "user")?.content ?? "";
    conversations.touch(this.id, nameOf(asked));
    open.set(this.id);
  }

  fail(said, partly, error) {
    if (error.name === "AbortError") {
      announce("Stopped");
      said.answer = partly && { ...partly, calls: [], finish: "stopped" };
      if (!partly?.text) said.error = new Error("Stopped before the answer began.");
      return;
    }
    blame({ param: "", code: "", ...error, message: error.message });
    said.error = error;
  }
}

function firstOfRole(messages, last) {
  let first = last;
  while (messages[last].role === "tool" && first > 0 && messages[first - 1].role === "tool") first -= 1;
  return first;
}

function asSent({ role, content, id, answer }) {
  if (role === "tool") return { role, tool_call_id: id ?? "", content };
  if (role !== "assistant" || !answer?.calls.length) return { role, content };
  const calls = answer.calls.map((call) => ({
    id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
  }));
  return { role, content, tool_calls: calls };
}

function nameOf(text) {
  const line = text.trim().split("\n")[0].replace(/^[#>*\s-]+(?=\S)/, "");
  return line.length > NAME_LENGTH ? `${line.slice(0, NAME_LENGTH - 1)}…` : line || "Conversation";
}

/** A balancer before several copies of the service finds the session's copy by the header. */
function askSession(id, method = "GET") {
  return ask(`/v1/sessions/${encodeURIComponent(id)}`, { method, headers: { "X-Session-ID": id } });
}

const keepsSessions = () => status?.sessions.enabled ?? true;

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `page-${Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("")}`;
}

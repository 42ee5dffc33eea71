// Requests to the service, and what their errors mean to a person.

import { key } from "./store.js";

/** The service said no, or did not answer. */
export class Refusal extends Error {
  constructor(status, error = {}, headers = new Headers()) {
    super(error.message || `The service answered with ${status}.`);
    this.status = status;
    this.code = error.code || "";
    this.param = error.param || "";
    this.requestId = error.request_id || headers.get("x-request-id") || "";
    this.seconds = Number(headers.get("retry-after")) || 0;
  }
}

/**
 * Ask the service; addresses are relative, so that a proxy may serve it below a path.
 * @returns {Promise<Response>} Of a success.
 * @throws {Refusal} For everything but a success.
 */
export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent["X-API-Key"] = key.get();
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path.replace(/^\//, ""), {
      method, headers: sent, signal, credentials: "omit",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refusal(response.status, said.error, response.headers);
}

/** The events of a stream, as objects; an error in it is thrown. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let isComplete = false;
  for (;;) {
    const { value, done } = await read(reader);
    if (done && isComplete) return;
    if (done) throw new Refusal(0, { message: "The answer broke off: the connection ended." });
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") isComplete = true;
      if (isComplete) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(503, event.error, response.headers);
      yield event;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "The answer broke off: the connection ended." });
  }
}

const ADVICE = {
  invalid_api_key: ["The service does not know this key.", "Enter a key; who runs the service has one."],
  insufficient_scope: ["This key may not talk to the model.", "Enter a key with the scope infer."],
  rate_limit_exceeded: ["Too many requests with this key.", ""],
  token_budget_exceeded: ["This key has used its tokens for today.", "They are counted anew at midnight UTC."],
  model_loading: ["The model is still loading.", "Ask again once the bar above is gone."],
  overloaded: ["The service is full.", ""],
  too_many_connections: ["The service is full.", ""],
  draining: ["The service is shutting down.", "Ask again when it is back."],
  engine_unavailable: ["The model's process is being started again.", ""],
  engine_failed: ["The model's process ended during the answer.", "It is started again; ask once more."],
  session_busy: ["Another answer of this conversation is under way.", "Wait for it, or stop it where it was asked for."],
  session_not_found: ["The service no longer has this conversation.", "It expired, the service was started anew, or it belongs to another key."],
  deadline_exceeded: ["The answer took longer than the service allows.", "Ask for fewer tokens."],
  context_length_exceeded: ["", "Shorten the text, lower max_tokens, or begin a new conversation."],
  prompt_too_long: ["", "Send less at once; security.max_prompt_chars sets the limit."],
};

/**
 * An error as sentences with what to do.
 * @returns {{title: string, advice: string, seconds: number, wantsKey: boolean, requestId: string}}
 */
export function explain(error) {
  const told = { title: error.message, advice: "", seconds: 0, wantsKey: false, requestId: "" };
  if (!(error instanceof Refusal)) return told;
  const [title, advice] = ADVICE[error.code] || ["", ""];
  told.title = title || error.message;
  told.advice = advice;
  told.requestId = error.requestId;
  told.seconds = error.status === 429 || error.status === 503 ? error.seconds : 0;
  told.wantsKey = error.status === 401 || error.status === 403;
  if (error.code === "invalid_api_key" && !key.get()) told.title = "The service wants a key.";
  if (error.status === 0 && error.message.endsWith("0.")) {
    told.title = "The service does not answer.";
    told.advice = "Is it running, and can this browser reach it?";
  }
  return told;
}

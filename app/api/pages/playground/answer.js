// One streamed answer: what comes, and what it took.

import { ask, events } from "./api.js";
import { h } from "./dom.js";

/**
 * Ask for an answer and read it to its end.
 * @param {{path: string, headers: Object, body: Object}} request Of a stream, with its usage.
 * @param {AbortSignal} signal Leaves the stream, by which the service stops generating.
 * @param {function} onPiece Called with the answer so far, for each piece.
 * @returns {Promise<Object>} The answer: text, reasoning, calls, and figures.
 */
export async function stream(request, signal, onPiece) {
  const begin = performance.now();
  const answer = { text: "", reasoning: "", calls: [], first: 0, last: 0, begin, finish: "", cached: false, usage: null };
  const response = await ask(request.path, { method: "POST", ...request, signal });
  answer.requestId = response.headers.get("x-request-id") || "";
  answer.appliedTokens = response.headers.get("x-max-tokens-applied");
  answer.notHeld = response.headers.get("x-schema-not-held");
  for await (const event of events(response)) {
    const choice = event.choices?.[0];
    if (choice && add(answer, choice)) {
      answer.last = performance.now();
      answer.first ||= answer.last;
      onPiece(answer);
    }
    if (event.cached !== undefined) answer.cached = event.cached;
    if (event.usage) answer.usage = event.usage;
  }
  return answer;
}

function add(answer, { text, delta = {}, finish_reason: finish }) {
  if (finish) answer.finish = finish;
  const piece = text ?? delta.content ?? "";
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  answer.text += piece;
  answer.reasoning += reasoning;
  for (const part of delta.tool_calls ?? []) {
    const call = (answer.calls[part.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id || "";
    call.name ||= part.function?.name || "";
    call.arguments += part.function?.arguments || "";
  }
  return Boolean(piece || reasoning || delta.tool_calls?.length);
}

const FINISH = {
  stop: "ended by the model", length: "cut off: max_tokens", tool_calls: "calls tools",
  content_filter: "ended by a filter", stopped: "stopped by you",
};

/** The figures of an answer, as a list. */
export function figures(answer) {
  const { usage, first, last, begin } = answer;
  const items = [];
  const add = (text, title) => items.push(h("li", { title }, text));
  const tokens = usage?.completion_tokens;
  if (tokens !== undefined) {
    const thought = usage.completion_tokens_details?.reasoning_tokens;
    add(`${tokens} tokens${thought ? `, ${thought} of them reasoning` : ""}`, "Tokens of the answer, its end included");
    // What came in one packet tells nothing of the speed.
    if (!answer.cached && tokens > 1 && last - first > 50) {
      add(`${(((tokens - 1) * 1000) / (last - first)).toFixed(1)} tokens/s`, "Tokens a second, from the first to the last");
    }
  }
  if (first) add(`first after ${duration(first - begin)}`, "Time from sending to the first token");
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    add(`${usage.prompt_tokens} in prompt, ${cached} cached`, "Tokens of the prompt, and those found in the KV cache");
    if (usage.dropped_messages) {
      add(`${usage.dropped_messages} oldest messages left out`, "The conversation no longer fits the model's context");
    }
  }
  if (usage) add(answer.cached ? "from the response cache" : "generated anew", "Whether the service had this answer already");
  if (answer.appliedTokens) add(`max_tokens cut to ${answer.appliedTokens}`, "The service's own limit");
  if (answer.notHeld) add(`schema not held: ${answer.notHeld}`, "Keywords that the answer need not obey");
  if (answer.finish) add(FINISH[answer.finish] || answer.finish, `finish_reason: ${answer.finish}`);
  if (answer.requestId) items.push(h("li", { title: "Request id, as in the service's log" }, h("code", {}, answer.requestId)));
  return h("ul.figures", { "aria-label": "Figures of this answer" }, items);
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

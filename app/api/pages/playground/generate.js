// The tab of bare prompts: the text goes on where the prompt ends.

import { figures, stream } from "./answer.js";
import { $, announce, copyButton, h } from "./dom.js";
import { faultNote } from "./faults.js";
import { blame, fault, fields } from "./settings.js";
import { status } from "./status.js";

let running = null;

export const isGenerating = () => running !== null;
export const stopGenerating = () => running?.abort();

export function startGenerate() {
  $("generate-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stopGenerating();
    else generate();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("generate-form").requestSubmit();
  });
}

/** The request that the tab would send. */
export function generateRequest() {
  return {
    path: "/v1/completions",
    headers: {},
    body: {
      model: status?.model.name ?? "default",
      prompt: $("prompt").value,
      ...fields({ chat: false }),
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}

async function generate() {
  const prompt = $("prompt").value;
  if (!prompt) return;
  const continued = h("span.continued");
  const text = h("div.continuation", { "aria-label": "The prompt and what follows" }, h("span.prompt-text", {}, prompt), continued);
  const under = h("div.under");
  $("generated").replaceChildren(text, under);
  const wrong = fault({ chat: false });
  if (wrong) {
    under.append(faultNote(new Error(wrong), null));
    return;
  }
  running = new AbortController();
  showRunning();
  let partly = null;
  try {
    const answer = await stream(generateRequest(), running.signal, (so) => {
      partly = so;
      continued.textContent = so.text;
    });
    under.append(h("div.actions", {}, copyButton(() => answer.text, "Copy the text")), figures(answer));
    announce(`Generated: ${answer.text}`);
  } catch (error) {
    if (error.name === "AbortError") {
      if (partly) under.append(figures({ ...partly, finish: "stopped" }));
      announce("Stopped");
    } else {
      blame({ param: "", code: "", ...error, message: error.message });
      under.append(faultNote(error, generate));
    }
  } finally {
    running = null;
    showRunning();
  }
}

function showRunning() {
  $("generate").textContent = running ? "Stop" : "Generate";
  $("generate").classList.toggle("primary", !running);
}

// The strip at the top: what is served, how full it is, and what is done while the model loads.

import { $, announce } from "./dom.js";

const EVERY = 2000;
const STATES = {
  ready: "Ready", loading: "Loading", restarting: "Starting again", draining: "Shutting down",
  failed: "Failed", stopped: "Stopped",
};

/** The last answer of /status; null where none has come. */
export let status = null;

const listeners = [];
export const onStatus = (listener) => listeners.push(listener);

/** Ask every two seconds, while the page is seen. */
export function watch() {
  let timer = null;
  const look = async () => {
    clearTimeout(timer);
    await refresh();
    if (!document.hidden) timer = setTimeout(look, EVERY);
  };
  document.addEventListener("visibilitychange", () => !document.hidden && look());
  return look();
}

export async function refresh() {
  const before = status?.engine.state;
  try {
    const response = await fetch("status", { credentials: "omit", cache: "no-store" });
    if (!response.ok) throw new Error(response.statusText);
    status = await response.json();
    // On this machine's clock, in milliseconds.
    status.started = Date.now() - status.uptime_seconds * 1000;
  } catch {
    show("unreachable", "No answer from the service");
    $("loading").hidden = true;
    return;
  }
  const { engine, model, name } = status;
  show(engine.state, STATES[engine.state] || engine.state);
  document.title = name;
  $("service-name").textContent = name;
  tell("model", model.name);
  tell("engine", [engine.backend, engine.dtype].filter((x) => x && x !== "none").join(" · "));
  tell("device", engine.device);
  tell("slots", `${engine.queue.running} / ${engine.queue.max_running}`);
  tell("queue", `${engine.queue.waiting} / ${engine.queue.max_waiting}`);
  showLoading(engine);
  if (before && before !== engine.state) announce(`The service is ${STATES[engine.state] || engine.state}`);
  for (const listener of listeners) listener(status);
}

function show(state, text) {
  $("state").dataset.state = state;
  $("state-text").textContent = text;
}

function tell(name, text) {
  $(`status-${name}`).textContent = text || "–";
}

/** A bar while there is something to wait for; it is full by as much as the message says. */
function showLoading({ state, message }) {
  const loading = state === "loading" || state === "restarting";
  $("loading").hidden = !loading;
  if (!loading) return;
  const text = message || "starting";
  $("loading-text").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  const share = /(\d+(?:\.\d+)?)\s?%/.exec(text);
  if (share) $("loading-bar").value = Math.min(100, Number(share[1]));
  else $("loading-bar").removeAttribute("value");
}

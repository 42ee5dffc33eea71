// An error on the page: a sentence, what to do, and a button that does it.

import { announce, h } from "./dom.js";
import { explain } from "./api.js";
import { enterKey } from "./key.js";

/**
 * @param {Error} error
 * @param {function} again Asks once more; null where nothing can be asked.
 * @returns {HTMLElement}
 */
export function faultNote(error, again) {
  const { title, advice, seconds, wantsKey, requestId } = explain(error);
  announce(`${title} ${advice}`);
  const count = h("span.count");
  const retry = again && h("button", { type: "button", onclick: again }, "Ask again");
  const note = h(
    "div.fault-note",
    {},
    h("p", {}, h("strong", {}, title), " ", advice, " ", count),
    h(
      "div.row",
      {},
      wantsKey ? h("button.primary", { type: "button", onclick: () => enterKey(again) }, "Enter a key") : null,
      wantsKey ? null : retry,
      requestId ? h("code.quiet", { title: "Request id, as in the service's log" }, requestId) : null,
    ),
  );
  if (seconds && retry) countDown(seconds, count, retry, note);
  return note;
}

function countDown(seconds, count, retry, note) {
  const end = Date.now() + seconds * 1000;
  retry.disabled = true;
  const tick = () => {
    const left = Math.ceil((end - Date.now()) / 1000);
    retry.disabled = left > 0;
    count.textContent = left > 0 ? `You can ask again in ${clock(left)}.` : "You can ask again now.";
    if (left <= 0 || !note.parentNode) clearInterval(timer);
  };
  const timer = setInterval(tick, 250);
  count.textContent = `You can ask again in ${clock(seconds)}.`;
}

function clock(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.ceil(seconds / 60)} minutes`;
  return `${Math.ceil(seconds / 3600)} hours`;
}

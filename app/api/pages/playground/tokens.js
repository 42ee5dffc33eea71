// The tab of tokens: how the model reads a text.

import { ask } from "./api.js";
import { $, announce, h } from "./dom.js";
import { faultNote } from "./faults.js";

const PAUSE = 500;
const COLOURS = 6;
const MOST_SHOWN = 4000;

let timer = null;
let asked = 0;

export function startTokens() {
  $("token-text").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(count, PAUSE);
  });
  $("token-ids").addEventListener("change", () => $("tokens").classList.toggle("with-ids", $("token-ids").checked));
}

async function count() {
  const text = $("token-text").value;
  const number = (asked += 1);
  if (!text) {
    $("tokens").replaceChildren();
    $("token-count").textContent = "";
    $("token-bar").value = 0;
    return;
  }
  try {
    const response = await ask("/v1/tokenize", { method: "POST", body: { text, return_token_strs: true } });
    const told = await response.json();
    if (number === asked) show(told, text);
  } catch (error) {
    if (number === asked) $("tokens").replaceChildren(faultNote(error, count));
  }
}

function show({ tokens, token_strs: texts, count: number, max_tokens: most }, text) {
  $("token-bar").max = most;
  $("token-bar").value = number;
  const share = ((number / most) * 100).toFixed(1);
  $("token-count").textContent =
    `${number} tokens of ${[...text].length} characters; the context holds ${most} (${share} %)`;
  announce(`${number} tokens`);
  const shown = tokens.slice(0, MOST_SHOWN);
  $("tokens").replaceChildren(...shown.flatMap((id, i) => token(id, texts[i], i)));
  if (tokens.length > shown.length) $("tokens").append(h("p.quiet", {}, `and ${tokens.length - shown.length} more`));
}

function token(id, text, place) {
  const breaks = text.includes("\n");
  const seen = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "·") || "∅";
  const element = h(`span.token.t${place % COLOURS}`, { title: `${JSON.stringify(text)}, id ${id}` }, seen, h("span.id", {}, String(id)));
  return breaks ? [element, h("br")] : element;
}

// The dialog for the key, which stays in this tab.

import { $, announce } from "./dom.js";
import { ask, explain } from "./api.js";
import { key } from "./store.js";

let afterwards = null;

export function startKey() {
  $("key-button").addEventListener("click", () => enterKey());
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-forget").addEventListener("click", () => {
    key.forget();
    show();
    $("key-dialog").close();
    announce("The key is forgotten");
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    accept($("key").value.trim());
  });
  show();
}

/** Ask for a key; `next` is called once the service has taken it. */
export function enterKey(next = null) {
  afterwards = next;
  $("key").value = "";
  $("key-fault").hidden = true;
  $("key-forget").hidden = !key.get();
  $("key-dialog").showModal();
  $("key").focus();
}

async function accept(entered) {
  const before = key.get();
  if (!entered) return;
  key.set(entered);
  try {
    await (await ask("/v1/models")).json();
  } catch (error) {
    const { title, advice } = explain(error);
    if (before) key.set(before);
    else key.forget();
    $("key-fault").textContent = `${title} ${advice}`;
    $("key-fault").hidden = false;
    $("key").select();
    return;
  }
  $("key-dialog").close();
  show();
  announce("The key is accepted");
  document.dispatchEvent(new Event("key"));
  afterwards?.();
}

function show() {
  const has = Boolean(key.get());
  $("key-button").textContent = has ? "Change the key" : "Enter a key";
  $("key-button").classList.toggle("primary", !has);
  document.body.classList.toggle("without-key", !has);
}

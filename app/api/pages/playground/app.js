// The start of the page, and what joins its parts. Nothing is read from the address.

import { Chat } from "./chat.js";
import { $, announce, copyButton, grow, h } from "./dom.js";
import { faultNote } from "./faults.js";
import { generateRequest, isGenerating, startGenerate, stopGenerating } from "./generate.js";
import { enterKey, startKey } from "./key.js";
import { startSettings } from "./settings.js";
import { curl, python } from "./snippets.js";
import { refresh, watch } from "./status.js";
import { conversations, key, open } from "./store.js";
import { startTokens } from "./tokens.js";
import { followAnswers, showConversations, showMessages } from "./view.js";

const TABS = ["chat", "generate", "tokens"];

const chat = new Chat(show);
let wasBusy = false;

function show() {
  showMessages(chat);
  showList();
  showComposer();
  // The strip need not wait two seconds to tell of a slot that was taken or is free again.
  if (chat.isBusy !== wasBusy) refresh();
  wasBusy = chat.isBusy;
}

function showList() {
  showConversations(chat, {
    list: conversations.list(),
    onopen: openConversation,
    onrename: (id, name) => {
      conversations.rename(id, name);
      showList();
    },
    onremove: async (id) => {
      try {
        await chat.remove(id);
        announce("Deleted");
      } catch (error) {
        $("messages").append(faultNote(error, null));
      }
      showList();
    },
  });
}

async function openConversation(id) {
  selectTab("chat");
  drawer("sidebar", false);
  try {
    await chat.load(id);
  } catch (error) {
    const note = faultNote(error, null);
    if (error.code === "session_not_found") {
      note.lastChild.prepend(h("button", { type: "button", onclick: () => chat.remove(id).then(showList) }, "Remove it from the list"));
    }
    $("messages").replaceChildren(note);
    $("welcome").hidden = true;
  }
}

function showComposer() {
  const busy = chat.isBusy;
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").classList.toggle("primary", !busy);
  $("send").title = busy ? "Esc" : "Enter";
}

function send() {
  const text = $("message").value;
  if (!text.trim() || chat.isBusy) return;
  if (!key.get()) {
    enterKey(send);
    return;
  }
  $("message").value = "";
  grow($("message"));
  chat.send(text);
}

function startComposer() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (chat.isBusy) chat.stop();
    else send();
  });
  $("message").addEventListener("input", () => grow($("message")));
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (chat.isBusy) chat.stop();
    else if (isGenerating()) stopGenerating();
    else for (const name of ["sidebar", "panel"]) drawer(name, false);
  });
  for (const button of document.querySelectorAll(".example")) {
    button.addEventListener("click", () => {
      $("message").value = button.textContent;
      send();
    });
  }
}

// On a narrow screen the two columns beside the page are drawers.
function drawer(name, isOpen = !document.body.classList.contains(`${name}-open`)) {
  document.body.classList.toggle(`${name}-open`, isOpen);
  $(`${name}-button`).setAttribute("aria-expanded", String(isOpen));
}

function startDrawers() {
  for (const name of ["sidebar", "panel"]) {
    $(`${name}-button`).addEventListener("click", () => {
      drawer(name === "panel" ? "sidebar" : "panel", false);
      drawer(name);
    });
  }
  $("shade").addEventListener("click", () => {
    for (const name of ["sidebar", "panel"]) drawer(name, false);
  });
  $("new").addEventListener("click", () => {
    chat.startNew();
    selectTab("chat");
    drawer("sidebar", false);
    $("message").focus();
  });
}

function selectTab(name) {
  for (const tab of TABS) {
    const selected = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", String(selected));
    $(`tab-${tab}`).tabIndex = selected ? 0 : -1;
    $(`view-${tab}`).hidden = !selected;
  }
  document.body.dataset.tab = name;
}

function startTabs() {
  for (const [i, tab] of TABS.entries()) {
    $(`tab-${tab}`).addEventListener("click", () => selectTab(tab));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = TABS[(i + step + TABS.length) % TABS.length];
      selectTab(next);
      $(`tab-${next}`).focus();
    });
  }
  selectTab("chat");
}

function startSnippets() {
  const dialog = $("snippet-dialog");
  const showSnippet = (write) => {
    const text = $("message").value.trim() || "Your message";
    const isChat = document.body.dataset.tab === "chat";
    $("snippet").textContent = write(isChat ? chat.request([{ role: "user", content: text, kept: false }]) : generateRequest());
    for (const [id, writer] of [["as-curl", curl], ["as-python", python]]) {
      $(id).setAttribute("aria-pressed", String(writer === write));
    }
  };
  $("snippet-actions").append(copyButton(() => $("snippet").textContent, "Copy"));
  $("as-curl").addEventListener("click", () => showSnippet(curl));
  $("as-python").addEventListener("click", () => showSnippet(python));
  for (const [id, write] of [["view-curl", curl], ["view-python", python]]) {
    $(id).addEventListener("click", () => {
      showSnippet(write);
      dialog.showModal();
    });
  }
  $("snippet-close").addEventListener("click", () => dialog.close());
}

function start() {
  startKey();
  startSettings();
  startComposer();
  startDrawers();
  startTabs();
  startGenerate();
  startTokens();
  startSnippets();
  followAnswers();
  document.addEventListener("key", () => open.get() && !chat.messages.length && openConversation(open.get()));
  $("welcome-key").addEventListener("click", () => enterKey());
  show();
  watch();
  if (open.get() && key.get()) openConversation(open.get());
  document.body.dataset.started = "true";
}

start();

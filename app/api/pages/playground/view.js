// The messages of a conversation as elements.

import { figures } from "./answer.js";
import { $, copyButton, grow, h, icon, iconButton } from "./dom.js";
import { faultNote } from "./faults.js";
import { Growing } from "./markdown.js";

/** @param {import("./chat.js").Chat} chat */
export function showMessages(chat) {
  const list = $("messages");
  // A button that was pressed is gone; the keyboard goes on from the conversation.
  const hadFocus = list.contains(document.activeElement);
  list.replaceChildren(...chat.messages.map((message, place) => element(chat, message, place)));
  $("welcome").hidden = chat.messages.length > 0;
  if (!chat.isBusy && chat.openCalls.length) list.append(callForm(chat));
  if (hadFocus) $("conversation").focus();
  scrollDown(true);
}

/** Follow what is written, unless its reader has scrolled up. */
export function followAnswers() {
  $("messages").addEventListener("grown", () => scrollDown(false));
}

function scrollDown(always) {
  const area = $("conversation");
  if (always || area.scrollHeight - area.scrollTop - area.clientHeight < 160) area.scrollTop = area.scrollHeight;
}

function element(chat, message, place) {
  if (message.role === "user") return question(chat, message, place);
  if (message.role === "tool") return toolResult(message);
  return answerElement(chat, message, place);
}

function question(chat, message, place) {
  const text = h("div.bubble", {}, message.content);
  const actions = h(
    "div.actions",
    {},
    copyButton(() => message.content, "Copy the question"),
    iconButton("edit", "Edit and send again", () => {
      if (!chat.isBusy) article.replaceChildren(editForm(chat, message, place, () => article.replaceChildren(text, actions)));
      article.querySelector("textarea")?.focus();
    }),
  );
  const article = h("article.message.user", { "aria-label": "You" }, text, actions);
  return article;
}

function editForm(chat, message, place, cancel) {
  const area = h("textarea", { "aria-label": "The question", rows: "2" });
  area.value = message.content;
  const form = h(
    "form.edit",
    {
      onsubmit: (event) => {
        event.preventDefault();
        if (area.value.trim() && !chat.isBusy) chat.edit(place, area.value);
      },
      onkeydown: (event) => {
        if (event.key === "Escape") cancel();
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          form.requestSubmit();
        }
      },
    },
    area,
    h(
      "div.row",
      {},
      h("button.primary", { type: "submit" }, "Send again"),
      h("button", { type: "button", onclick: cancel }, "Cancel"),
      h("span.quiet", {}, "What follows is replaced."),
    ),
  );
  area.addEventListener("input", () => grow(area));
  requestAnimationFrame(() => grow(area));
  return form;
}

function toolResult(message) {
  return h("article.message.tool", { "aria-label": "A tool's answer" }, h("span.tag", {}, "Tool's answer"), h("pre", { tabindex: "0" }, message.content));
}

function answerElement(chat, message, place) {
  const isLast = place === chat.messages.length - 1;
  const isRunning = isLast && chat.isBusy;
  const reasoning = h("details.reasoning", { hidden: true }, h("summary", {}, "Reasoning"), h("div.thought"));
  const body = h("div.prose");
  const calls = h("div.calls");
  const article = h("article.message.assistant", { "aria-label": "The model", "aria-busy": String(isRunning) }, reasoning, body, calls);
  const growing = new Growing(body);
  const show = (answer) => {
    reasoning.hidden = !answer.reasoning;
    reasoning.lastChild.textContent = answer.reasoning;
    if (answer.reasoning && !answer.text) reasoning.firstChild.textContent = "Reasoning …";
    else reasoning.firstChild.textContent = "Reasoning";
    calls.replaceChildren(...answer.calls.map(callElement));
    growing.show(answer.text);
  };
  message.show = show;
  const kept = callsInText(message);
  show(message.answer ?? { text: kept.text, reasoning: "", calls: kept.calls });
  growing.flush();
  if (isRunning && !message.content) body.append(h("span.waiting", {}, "Waiting for the first token"));
  if (message.error) {
    article.append(faultNote(message.error, () => chat.isBusy || chat.regenerate(place)));
    return article;
  }
  if (isRunning) return article;
  article.append(
    h(
      "div.under",
      {},
      h(
        "div.actions",
        {},
        copyButton(() => message.content, "Copy the answer"),
        iconButton("again", "Ask for another answer", () => chat.isBusy || chat.regenerate(place)),
      ),
      message.answer ? figures(message.answer) : null,
      message.answer && !message.kept
        ? h("p.quiet", {}, "The service keeps complete answers only; this one goes along with your next message.")
        : null,
    ),
  );
  return article;
}

/** The service keeps an answer's calls as the model wrote them, with a repeated one that ended it. */
function callsInText({ content }) {
  const calls = [];
  const text = content.replace(/<tool_call>\s*(\{[\s\S]*?)\s*(?:<\/tool_call>|$)/g, (all, json) => {
    try {
      const { name, arguments: given } = JSON.parse(json);
      const call = { name, arguments: JSON.stringify(given) };
      if (!calls.some((c) => c.name === call.name && c.arguments === call.arguments)) calls.push(call);
      return "";
    } catch {
      // The repeated call is cut off where that was noticed.
      return calls.length && !all.endsWith("</tool_call>") ? "" : all;
    }
  });
  return { text: text.trim(), calls };
}

function callElement(call) {
  return h("div.call", {}, h("span.tag", {}, "Calls"), h("code", {}, `${call.name}(${pretty(call.arguments)})`));
}

function pretty(json) {
  try {
    return Object.entries(JSON.parse(json)).map(([k, v]) => `${k}: ${JSON.stringify(v)}`).join(", ");
  } catch {
    return json;
  }
}

/** A form with a field for the result of each call. */
function callForm(chat) {
  const fields = chat.openCalls.map((call, i) =>
    h("label.field", { for: `result-${i}` }, h("span", {}, "Result of ", h("code", {}, `${call.name}(${pretty(call.arguments)})`)),
      h("textarea", { id: `result-${i}`, rows: "2", required: true, placeholder: '{"temperature": 21}' })),
  );
  return h(
    "form.call-form",
    {
      "aria-label": "Answer the calls",
      onsubmit: (event) => {
        event.preventDefault();
        chat.answerCalls([...event.target.querySelectorAll("textarea")].map((area) => area.value));
      },
    },
    h("p", {}, "The model calls a function. Run it yourself, and give it the result."),
    fields,
    h("div.row", {}, h("button.primary", { type: "submit" }, "Give the result")),
  );
}

/** The list of conversations. */
export function showConversations(chat, { list, onopen, onrename, onremove }) {
  $("conversations").replaceChildren(
    ...list.map(({ id, name }) => {
      const row = h("li", { class: id === chat.id ? "current" : null });
      const title = h("button.name", { type: "button", "aria-current": id === chat.id ? "true" : null, onclick: () => onopen(id) }, name);
      row.append(title, h("span.actions", {}, iconButton("edit", `Rename ${name}`, () => rename(row, name, (to) => onrename(id, to))), removeButton(name, () => onremove(id))));
      return row;
    }),
  );
  $("no-conversations").hidden = list.length > 0;
}

function rename(row, name, done) {
  const input = h("input", { "aria-label": "Name of the conversation", maxlength: "80" });
  input.value = name;
  let over = false;
  const end = (to) => {
    if (over) return;
    over = true;
    done(to.trim() || name);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(input.value);
    if (event.key === "Escape") {
      event.stopPropagation();
      end(name);
    }
  });
  input.addEventListener("blur", () => end(input.value));
  row.replaceChildren(input);
  input.select();
}

/** Deleting takes two clicks, as nothing brings a conversation back. */
function removeButton(name, remove) {
  const button = iconButton("remove", `Delete ${name}`, () => {
    if (button.classList.contains("sure")) {
      remove();
      return;
    }
    button.classList.add("sure");
    button.setAttribute("aria-label", `Delete ${name} from the service: press again`);
    button.replaceChildren("Delete?");
    setTimeout(() => {
      button.classList.remove("sure");
      button.setAttribute("aria-label", `Delete ${name}`);
      button.replaceChildren(icon("remove"));
    }, 4000);
  });
  return button;
}

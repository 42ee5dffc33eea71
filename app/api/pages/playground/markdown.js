// The model's Markdown as elements. What a model writes is not to be trusted: its HTML is shown as
// text, and DOMPurify lets pass only the elements that Markdown makes. Nothing is loaded by it.

import { Marked } from "./vendor/marked.esm.js";
import { copyButton, h } from "./dom.js";

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => String(text).replace(/[&<>"']/g, (c) => ENTITIES[c]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text)}</p>` : escape(text)),
    // An image would tell its server what was said here.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code({ text, lang }) {
      const language = /^[\w+#.-]{1,30}/.exec(lang || "")?.[0] || "";
      return `<pre title="${escape(language)}"><code>${escape(text)}</code></pre>`;
    },
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td",
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

/** Markdown as a fragment of a document. */
export function render(text) {
  const fragment = globalThis.DOMPurify.sanitize(marked.parse(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.setAttribute("target", "_blank");
    link.setAttribute("rel", "noopener noreferrer nofollow");
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div.scrolls", { tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const heading of fragment.querySelectorAll("h1,h2,h3,h4,h5,h6")) lower(heading);
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  return fragment;
}

/** An answer's headings are below the page's own. */
function lower(heading) {
  const level = Math.min(6, Number(heading.tagName[1]) + 2);
  heading.replaceWith(h(`h${level}`, {}, ...heading.childNodes));
}

function frameCode(pre) {
  const language = pre.getAttribute("title") || "text";
  pre.removeAttribute("title");
  pre.setAttribute("tabindex", "0");
  const frame = h(
    "div.code",
    {},
    h("div.code-head", {}, h("span", {}, language), copyButton(() => pre.textContent, "Copy the code")),
  );
  pre.replaceWith(frame);
  frame.append(pre);
}

/** Shows a text that grows, at most every 60 ms, since each time renders it as a whole. */
export class Growing {
  constructor(element) {
    this.element = element;
    this.timer = null;
  }

  show(text) {
    this.text = text;
    this.timer ??= setTimeout(() => this.flush(), 60);
  }

  flush() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.text !== undefined) this.element.replaceChildren(render(this.text));
    this.element.dispatchEvent(new Event("grown", { bubbles: true }));
  }
}

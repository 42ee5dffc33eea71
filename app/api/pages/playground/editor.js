// A text area for JSON that shows where a mistake is.

import { h } from "./dom.js";

/**
 * @param {HTMLElement} host Filled with the editor.
 * @param {{label: string, describedby: string, placeholder: string, onchange: function}} options
 */
export class JsonEditor {
  constructor(host, { id, placeholder, describedby, onchange }) {
    this.area = h("textarea.json", {
      id, placeholder, spellcheck: "false", autocapitalize: "off", rows: "8", wrap: "off",
      "aria-describedby": `${describedby} ${id}-error`,
    });
    this.numbers = h("div.line-numbers", { "aria-hidden": "true" });
    this.fault = h("p.fault", { id: `${id}-error`, hidden: true });
    this.area.addEventListener("input", () => {
      this.refused = null;
      this.check();
      onchange();
    });
    this.area.addEventListener("scroll", () => {
      this.numbers.scrollTop = this.area.scrollTop;
    });
    host.append(h("div.json-editor", {}, this.numbers, this.area), this.fault);
    this.check();
  }

  get text() {
    return this.area.value;
  }

  set text(value) {
    this.area.value = value;
    this.check();
  }

  /** What it holds; undefined where it is empty or no JSON. */
  get value() {
    try {
      return this.text.trim() ? JSON.parse(this.text) : undefined;
    } catch {
      return undefined;
    }
  }

  get isWrong() {
    return this.text.trim() !== "" && this.value === undefined;
  }

  /** Show what the service found wrong, until the text changes; `root` is its name for the whole. */
  refuse(message, root) {
    this.refused = { message, ...placeOf(this.text, message, root) };
    this.check();
  }

  check() {
    const found = (this.text.trim() ? findFault(this.text) : null) || this.refused;
    const lines = this.text.split("\n").length;
    this.numbers.replaceChildren(
      ...Array.from({ length: lines }, (_, i) =>
        h(found?.line === i + 1 ? "span.at-fault" : "span", {}, `${i + 1}`)),
    );
    this.area.setAttribute("aria-invalid", found ? "true" : "false");
    this.fault.hidden = !found;
    if (!found) return;
    const where = found.line ? `Line ${found.line}, column ${found.column}: ` : "";
    this.fault.replaceChildren(where + found.message);
    if (found.line) {
      this.fault.append(" ", h("button.link", { type: "button", onclick: () => this.goTo(found.offset) }, "Go there"));
    }
  }

  goTo(offset) {
    this.area.focus();
    this.area.setSelectionRange(offset, Math.min(offset + 1, this.text.length));
  }
}

/** Where and why a text is no JSON; null where it is. Browsers' own errors often name no place. */
function findFault(text) {
  try {
    new Reader(text).whole();
    return null;
  } catch (fault) {
    return { ...fault, ...lineOf(text, fault.offset) };
  }
}

function lineOf(text, offset) {
  const before = text.slice(0, offset).split("\n");
  return { offset, line: before.length, column: before.at(-1).length + 1 };
}

/** Where a text has the value that a message names, as in "schema.properties.city: …". */
function placeOf(text, message, root) {
  // It may have changed while the service was asked.
  if (findFault(text)) return {};
  const reader = new Reader(text);
  reader.whole();
  const named = [...reader.places.keys()].filter((path) => message.includes(`${root}${path}: `));
  return named.length ? lineOf(text, reader.places.get(named[0])) : {};
}

const ESCAPE = /\\(["\\/bfnrt]|u[0-9a-fA-F]{4})/y;
const PLAIN = /(?:-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null)(?![\w.])/y;

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.path = "";
    /** Where each value begins, by the names that lead to it. */
    this.places = new Map();
  }

  within(name, read) {
    const outer = this.path;
    this.path += `.${name}`;
    read();
    this.path = outer;
  }

  fail(message, offset = this.at) {
    throw { message, offset };
  }

  /** The next character that is no white space. */
  next() {
    while (" \t\r\n".includes(this.text[this.at] ?? "x")) this.at += 1;
    return this.text[this.at];
  }

  take(character, otherwise) {
    if (this.next() !== character) this.fail(this.at < this.text.length ? otherwise : "The text ends too early.");
    this.at += 1;
  }

  whole() {
    this.value();
    if (this.next() !== undefined) this.fail("Nothing may follow the value.");
  }

  value() {
    const first = this.next();
    this.places.set(this.path, this.at);
    if (first === "{") this.list("}", () => this.member());
    else if (first === "[") this.list("]", (i) => this.within(i, () => this.value()));
    else if (first === '"') this.string();
    else if (first === undefined) this.fail("The text ends too early.");
    else this.plain();
  }

  list(end, member) {
    this.at += 1;
    if (this.next() === end) {
      this.at += 1;
      return;
    }
    for (let i = 0; ; i += 1) {
      if (this.next() === end) this.fail("No comma may stand before the end.");
      member(i);
      if (this.next() === end) break;
      this.take(",", `A comma or ${end} is missing.`);
    }
    this.at += 1;
  }

  member() {
    if (this.next() !== '"') this.fail("A name in double quotes is missing.");
    const begin = this.at;
    this.string();
    const name = JSON.parse(this.text.slice(begin, this.at));
    this.take(":", "A colon is missing after the name.");
    this.within(name, () => this.value());
  }

  string() {
    const begin = this.at;
    for (this.at += 1; this.text[this.at] !== '"'; this.at += 1) {
      const character = this.text[this.at];
      if (character === undefined || character === "\n") this.fail("This string has no end.", begin);
      if (character < " ") this.fail("A control character must be escaped.");
      if (character === "\\") {
        ESCAPE.lastIndex = this.at;
        if (!ESCAPE.test(this.text)) this.fail("There is no such escape.");
        this.at = ESCAPE.lastIndex - 1;
      }
    }
    this.at += 1;
  }

  plain() {
    PLAIN.lastIndex = this.at;
    if (!PLAIN.test(this.text)) this.fail("This is no JSON value.");
    this.at = PLAIN.lastIndex;
  }
}

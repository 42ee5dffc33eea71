// Elements, made without any HTML: text is text.

/**
 * Make an element.
 * @param {string} tag Its name, with classes after dots: "p.note".
 * @param {Object} props Attributes; `on…` is a listener, `true` an empty attribute, null is left out.
 * @param {...(Node|string|null)} children
 */
export function h(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(key, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return element;
}

export const $ = (id) => document.getElementById(id);

const ICONS = {
  copy: "M9 9V4h11v11h-5M4 9h11v11H4z",
  edit: "M4 20l1-5L16 4l4 4L9 19z",
  again: "M4 11a8 8 0 0 1 14-4l2 2M20 4v5h-5M20 13a8 8 0 0 1-14 4l-2-2M4 20v-5h5",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  plus: "M12 5v14M5 12h14",
  done: "M5 13l4 4L19 7",
};

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  for (const [key, value] of [["viewBox", "0 0 24 24"], ["aria-hidden", "true"], ["class", "icon"]]) {
    svg.setAttribute(key, value);
  }
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A small button with an icon; its label is told to screen readers and shown on hover. */
export function iconButton(name, label, onclick) {
  return h("button.icon-button", { type: "button", title: label, "aria-label": label, onclick }, icon(name));
}

/** A button that copies what `text` returns, and says for a moment that it has. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "done" : "copy"));
    announce(copied ? "Copied" : "The browser did not let this page copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard needs HTTPS or localhost; a selection can be copied anywhere.
    const area = h("textarea.visually-hidden", { "aria-hidden": "true" });
    area.value = text;
    (document.querySelector("dialog[open]") || document.body).append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Tell something to screen readers, once. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** Let a text area grow with its text. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

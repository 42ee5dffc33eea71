// What outlives a reload. The key is in this tab's sessionStorage alone; conversations are the
// service's own sessions, of which this browser keeps the ids and the names.

const CONVERSATIONS = "playground.conversations";
const SETTINGS = "playground.settings";
const OPEN = "playground.open";
const MOST = 100;

function read(storage, name, fallback) {
  try {
    return JSON.parse(storage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage may be full or forbidden; then the page works until it is closed.
  }
}

export const key = {
  get: () => sessionStorage.getItem("playground.key") || "",
  set: (value) => sessionStorage.setItem("playground.key", value),
  forget: () => sessionStorage.removeItem("playground.key"),
};

/** Conversations as `{id, name}`, the latest first. */
export const conversations = {
  list() {
    const kept = read(localStorage, CONVERSATIONS, []);
    return Array.isArray(kept) ? kept.filter((c) => /^[A-Za-z0-9._:-]{1,128}$/.test(c?.id)) : [];
  },
  /** Put a conversation first; the name stays where it has one. */
  touch(id, name) {
    const all = this.list();
    const known = all.find((c) => c.id === id);
    const others = all.filter((c) => c.id !== id);
    write(localStorage, CONVERSATIONS, [{ id, name: known?.name ?? name }, ...others].slice(0, MOST));
  },
  rename(id, name) {
    write(localStorage, CONVERSATIONS, this.list().map((c) => (c.id === id ? { id, name } : c)));
  },
  remove(id) {
    write(localStorage, CONVERSATIONS, this.list().filter((c) => c.id !== id));
  },
};

/** The conversation that this tab shows. */
export const open = {
  get: () => read(sessionStorage, OPEN, null),
  set: (id) => write(sessionStorage, OPEN, id),
};

export const settings = {
  get: () => read(sessionStorage, SETTINGS, {}),
  set: (values) => write(sessionStorage, SETTINGS, values),
};

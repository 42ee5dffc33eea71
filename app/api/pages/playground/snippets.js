// The present request as a command and as a program, which read the key from the environment.

/** @typedef {{path: string, headers: Object, body: Object}} Request */

const base = () => new URL(".", document.baseURI).href.replace(/\/$/, "");
const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** @param {Request} request */
export function curl({ path, headers, body }) {
  const lines = [
    `curl -N ${quote(`${base()}${path}`)}`,
    '-H "Authorization: Bearer $API_KEY"',
    "-H 'Content-Type: application/json'",
    ...Object.entries(headers).map(([name, value]) => `-H ${quote(`${name}: ${value}`)}`),
    `-d ${quote(JSON.stringify(body, null, 2))}`,
  ];
  return lines.join(" \\\n  ");
}

// The client has no parameters for these; it sends them as they are.
const EXTRA = new Set(["cache", "top_k", "min_p", "repetition_penalty"]);
const OWN_OF_CHAT = new Set(["response_format"]);

/** @param {Request} request */
export function python({ path, headers, body }) {
  const chat = path.endsWith("/chat/completions");
  const isExtra = (name) => EXTRA.has(name) || (!chat && OWN_OF_CHAT.has(name));
  const own = Object.entries(body).filter(([name]) => !isExtra(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => isExtra(name)));
  const given = own.map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (Object.keys(headers).length) given.push(`    extra_headers=${literal(headers, 1)},`);
  if (Object.keys(extra).length) given.push(`    extra_body=${literal(extra, 1)},`);
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${literal(`${base()}/v1`)}, api_key=os.environ["API_KEY"])
stream = client.${chat ? "chat.completions" : "completions"}.create(
${given.join("\n")}
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.${chat ? "delta.content" : "text"} or "", end="", flush=True)
`;
}

function literal(value, depth = 0) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const members = Array.isArray(value)
    ? value.map((v) => literal(v, depth + 1))
    : Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${literal(v, depth + 1)}`);
  const [begin, end] = Array.isArray(value) ? "[]" : "{}";
  const line = begin + members.join(", ") + end;
  if (line.length <= 80 - 4 * depth && !line.includes("\n")) return line;
  const indent = "    ".repeat(depth + 1);
  return `${begin}\n${members.map((m) => `${indent}${m},\n`).join("")}${"    ".repeat(depth)}${end}`;
}

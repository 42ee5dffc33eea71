// The panel of a request's fields. Fields that are empty are not sent: the service's defaults hold.

import { $ } from "./dom.js";
import { JsonEditor } from "./editor.js";
import { onStatus } from "./status.js";
import { settings } from "./store.js";

const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed", "stop", "format", "choice"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let schema;
let tools;

export function startSettings() {
  const kept = settings.get();
  const changed = () => {
    save();
    showParts();
  };
  schema = new JsonEditor($("schema-editor"), {
    id: "schema", describedby: "schema-help", onchange: changed,
    placeholder: '{\n  "type": "object",\n  "properties": {\n    "city": {"type": "string"}\n  },\n  "required": ["city"]\n}',
  });
  tools = new JsonEditor($("tools-editor"), {
    id: "tools", describedby: "tools-help", onchange: changed,
    placeholder: '[{\n  "type": "function",\n  "function": {\n    "name": "weather",\n    "parameters": {\n      "type": "object",\n      "properties": {"city": {"type": "string"}},\n      "required": ["city"]\n    }\n  }\n}]',
  });
  for (const name of FIELDS) {
    $(name).value = kept[name] ?? $(name).value;
    $(name).addEventListener("input", changed);
  }
  schema.text = kept.schema ?? "";
  tools.text = kept.tools ?? "";
  $("reset").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = $(name).tagName === "SELECT" ? $(name).options[0].value : "";
    schema.text = "";
    tools.text = "";
    changed();
  });
  onStatus(({ model, limits, environment }) => {
    $("docs-link").hidden = environment === "production";
    $("temperature").placeholder = model.sampling.temperature ?? 0.7;
    $("top_p").placeholder = model.sampling.top_p ?? 1;
    $("max_tokens").placeholder = limits.max_tokens;
    $("max_tokens").max = limits.max_tokens;
    $("seed").placeholder = "random";
  });
  showParts();
}

function save() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  settings.set({ ...values, schema: schema.text, tools: tools.text });
}

function showParts() {
  $("schema-part").hidden = $("format").value !== "json_schema";
  $("choice-part").hidden = tools.value === undefined;
}

export const systemPrompt = () => $("system").value.trim();

/** What is wrong with the fields, as a sentence; empty where nothing is. */
export function fault({ chat }) {
  for (const name of NUMBERS) {
    if (!$(name).checkValidity()) return `${name}: ${$(name).validationMessage}`;
  }
  if ($("format").value === "json_schema" && schema.value === undefined) {
    return schema.isWrong ? "The JSON schema has a mistake; the panel shows where." : "The JSON schema is empty.";
  }
  if (chat && tools.isWrong) return "The tools have a mistake; the panel shows where.";
  return "";
}

/** The fields as members of a request's body. */
export function fields({ chat }) {
  const body = {};
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  const stops = $("stop").value.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops.length > 1 ? stops : stops[0];
  if ($("format").value === "json_object") body.response_format = { type: "json_object" };
  if ($("format").value === "json_schema" && schema.value !== undefined) {
    body.response_format = {
      type: "json_schema", json_schema: { name: "answer", schema: schema.value, strict: true },
    };
  }
  if (chat && tools.value !== undefined) {
    body.tools = tools.value;
    if ($("choice").value !== "auto") body.tool_choice = $("choice").value;
  }
  return body;
}

/** Show a refusal beside the field that it is about. */
export function blame({ param, code, message }) {
  if (code === "invalid_grammar" || param.startsWith("response_format")) {
    if ($("format").value === "json_schema") schema.refuse(message, "response_format.json_schema.schema");
  }
  if (param.startsWith("tools")) tools.refuse(message, "tools");
}

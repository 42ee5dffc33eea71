// An ordinary program of OpenAI's client for JavaScript.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { ANSWER, assert, KEY, Person, PERSON, QUESTION, run, URL, WEATHER, z } from "./ordinary.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: KEY });
const asked = { model: "default", temperature: 0, max_tokens: 160 };
const user = (content) => [{ role: "user", content }];

async function chat() {
  const answer = await client.chat.completions.create({
    ...asked,
    messages: user(QUESTION),
    store: true,
    metadata: { trace: "a" },
  });
  assert.equal(answer.choices[0].message.content, ANSWER);
}

async function stream() {
  const found = client.chat.completions.stream({ ...asked, messages: user(QUESTION) });
  assert.equal((await found.finalMessage()).content, ANSWER);
}

async function tools() {
  const Weather = z.object({ city: z.string().max(20) });
  const tool = zodFunction({ name: "get_weather", parameters: Weather });
  const messages = user(WEATHER);
  const fields = { ...asked, tools: [tool] };
  const first = await client.chat.completions.parse({
    ...fields,
    messages,
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  const said = first.choices[0].message;
  assert.equal(typeof said.tool_calls[0].function.parsed_arguments.city, "string");
  messages.push(said);
  messages.push({ role: "tool", tool_call_id: said.tool_calls[0].id, content: "12 degrees" });
  const second = await client.chat.completions.create({ ...fields, messages, tool_choice: "none" });
  assert.ok(second.choices[0].message.content);
}

async function structured() {
  const answer = await client.chat.completions.parse({
    ...asked,
    messages: user(PERSON),
    response_format: zodResponseFormat(Person, "person"),
  });
  assert.ok(Person.parse(answer.choices[0].message.parsed));
}

async function abort() {
  const left = new AbortController();
  const found = await client.chat.completions.create(
    { ...asked, messages: user("Tell me a very long story."), stream: true },
    { signal: left.signal },
  );
  for await (const _ of found) left.abort();
}

await run("openai_js", [chat, stream, tools, structured, abort]);

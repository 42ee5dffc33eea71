// An ordinary program of OpenAI's client for JavaScript.
import OpenAI from "openai";
import {
  zodFunction,
  zodResponseFormat,
  zodResponsesFunction,
  zodTextFormat,
} from "openai/helpers/zod";
import {
  ANSWER,
  assert,
  BUSY_URL,
  KEY,
  Person,
  PERSON,
  QUESTION,
  run,
  STORY,
  URL,
  WEATHER,
  z,
} from "./ordinary.mjs";

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
    { ...asked, messages: user(STORY), stream: true },
    { signal: left.signal },
  );
  for await (const _ of found) left.abort();
}

async function retry() {
  const patient = new OpenAI({ baseURL: BUSY_URL, apiKey: KEY });
  const answer = await patient.chat.completions.create({ ...asked, messages: user(QUESTION) });
  assert.equal(answer.choices[0].message.content, ANSWER);
}

const answered = { model: "default", temperature: 0, max_output_tokens: 160 };

async function response() {
  const first = await client.responses.create({ ...answered, input: QUESTION });
  assert.equal(first.output_text, ANSWER);
  const found = client.responses.stream({
    ...answered,
    input: "And of Italy?",
    previous_response_id: first.id,
  });
  let said = "";
  found.on("response.output_text.delta", (event) => (said += event.delta));
  assert.equal((await found.finalResponse()).output_text, said);
}

async function response_tools() {
  const Weather = z.object({ city: z.string().max(20) });
  const tool = zodResponsesFunction({ name: "get_weather", parameters: Weather });
  const fields = { ...answered, tools: [tool] };
  const input = user(WEATHER);
  const first = await client.responses.parse({ ...fields, input, tool_choice: "required" });
  const call = first.output.find((item) => item.type === "function_call");
  assert.equal(typeof call.parsed_arguments.city, "string");
  input.push(...first.output);
  input.push({ type: "function_call_output", call_id: call.call_id, output: "12 degrees" });
  const second = await client.responses.create({ ...fields, input, tool_choice: "none" });
  assert.ok(second.output_text);
}

async function response_structured() {
  const text = { format: zodTextFormat(Person, "person") };
  const answer = await client.responses.parse({ ...answered, input: PERSON, text });
  assert.ok(Person.parse(answer.output_parsed));
}

const chats = [chat, stream, tools, structured, abort, retry];
await run("openai_js", [...chats, response, response_tools, response_structured]);

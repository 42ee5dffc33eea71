// An ordinary program of LangChain for JavaScript.
import { ChatOpenAI } from "@langchain/openai";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
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

const options = {
  model: "default",
  apiKey: KEY,
  configuration: { baseURL: URL },
  temperature: 0,
  maxTokens: 160,
  maxRetries: 0,
};
const model = new ChatOpenAI(options);
const weather = tool(async ({ city }) => `12 degrees in ${city}`, {
  name: "get_weather",
  description: "The weather of a city.",
  schema: z.object({ city: z.string().max(20) }),
});

async function chat() {
  assert.equal((await model.invoke(QUESTION)).text, ANSWER);
}

async function stream() {
  let said = "";
  for await (const piece of await model.stream(QUESTION)) said += piece.text;
  assert.equal(said, ANSWER);
}

async function tools() {
  const messages = [new HumanMessage(WEATHER)];
  const caller = model.bindTools([weather], { tool_choice: "required" });
  const said = await caller.invoke(messages);
  messages.push(said);
  for (const call of said.tool_calls)
    messages.push(new ToolMessage({ content: "12 degrees", tool_call_id: call.id }));
  assert.ok((await model.bindTools([weather], { tool_choice: "none" }).invoke(messages)).text);
}

async function structured() {
  for (const method of ["jsonSchema", "functionCalling"])
    assert.ok(Person.parse(await model.withStructuredOutput(Person, { method }).invoke(PERSON)));
}

async function abort() {
  const left = new AbortController();
  const read = async () => {
    for await (const _ of await model.stream(STORY, { signal: left.signal })) left.abort();
  };
  await assert.rejects(read);
}

async function retry() {
  const patient = { ...options, maxRetries: 2, configuration: { baseURL: BUSY_URL } };
  assert.equal((await new ChatOpenAI(patient).invoke(QUESTION)).text, ANSWER);
}

await run("langchain_js", [chat, stream, tools, structured, abort, retry]);

// An ordinary program of LangChain for JavaScript.
import { ChatOpenAI } from "@langchain/openai";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ANSWER, assert, KEY, Person, PERSON, QUESTION, run, URL, WEATHER, z } from "./ordinary.mjs";

const model = new ChatOpenAI({
  model: "default",
  apiKey: KEY,
  configuration: { baseURL: URL },
  temperature: 0,
  maxTokens: 160,
  maxRetries: 0,
});
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

await run("langchain_js", [chat, stream, tools, structured]);

// An ordinary program of Vercel's AI SDK.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { ANSWER, assert, KEY, Person, PERSON, QUESTION, run, URL, WEATHER, z } from "./ordinary.mjs";

const options = { name: "service", baseURL: URL, apiKey: KEY };
const plain = createOpenAICompatible({ ...options })("default");
const model = createOpenAICompatible({ ...options, supportsStructuredOutputs: true })("default");
const asked = { temperature: 0, maxOutputTokens: 160, maxRetries: 0 };
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: async ({ city }) => `12 degrees in ${city}`,
});

async function chat() {
  const { text, usage } = await generateText({ model: plain, prompt: QUESTION, ...asked });
  assert.equal(text, ANSWER);
  assert.ok(usage.totalTokens > 0);
}

async function stream() {
  let said = "";
  for await (const piece of streamText({ model: plain, prompt: QUESTION, ...asked }).textStream)
    said += piece;
  assert.equal(said, ANSWER);
}

async function tools() {
  const { toolResults } = await generateText({
    model: plain,
    prompt: WEATHER,
    tools: { weather },
    toolChoice: "required",
    ...asked,
  });
  assert.match(String(toolResults[0].output), /12 degrees/);
}

async function two_turns() {
  const { steps } = await generateText({
    model: plain,
    prompt: WEATHER,
    tools: { weather },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
    stopWhen: ({ steps: done }) => done.length === 2,
    ...asked,
  });
  assert.equal(steps.length, 2);
  assert.ok(steps[1].text);
}

async function structured() {
  const { output } = await generateText({
    model,
    prompt: PERSON,
    output: Output.object({ schema: Person }),
    ...asked,
  });
  assert.ok(Person.parse(output));
}

await run("ai_sdk", [chat, stream, tools, two_turns, structured]);

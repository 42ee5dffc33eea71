// An ordinary program of Vercel's AI SDK, with its default provider and on chat completions.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
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

const options = { name: "service", baseURL: URL, apiKey: KEY };
const responses = createOpenAI(options)("default");
let plain = responses;
let busy = createOpenAI({ ...options, baseURL: BUSY_URL })("default");
let model = responses;
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

async function conversation() {
  const messages = [{ role: "user", content: QUESTION }];
  const first = await generateText({ model: plain, messages, ...asked });
  messages.push(...first.response.messages, { role: "user", content: "And of Italy?" });
  assert.ok((await generateText({ model: plain, messages, ...asked })).text);
}

async function abort() {
  const left = new AbortController();
  const asking = { model: plain, prompt: STORY, abortSignal: left.signal, ...asked };
  for await (const _ of streamText(asking).textStream) left.abort();
}

async function retry() {
  const { text } = await generateText({ model: busy, prompt: QUESTION, ...asked, maxRetries: 2 });
  assert.equal(text, ANSWER);
}

const parts = [chat, stream, tools, two_turns, structured, conversation, abort, retry];
await run("ai_sdk", parts);
plain = createOpenAICompatible({ ...options })("default");
busy = createOpenAICompatible({ ...options, baseURL: BUSY_URL })("default");
model = createOpenAICompatible({ ...options, supportsStructuredOutputs: true })("default");
await run("ai_sdk", parts);

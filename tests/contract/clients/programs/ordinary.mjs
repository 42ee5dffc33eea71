// What the programs in JavaScript share; see ordinary.py. It is copied beside the packages.
import assert from "node:assert/strict";
import { z } from "zod";

export const URL = process.env.CLIENT_URL;
export const BUSY_URL = process.env.CLIENT_BUSY_URL;
export const KEY = process.env.CLIENT_KEY;
export const QUESTION = "What is the capital of France?";
export const ANSWER = "The capital of France is Paris.";
export const STORY = "Tell me a very long story about a lighthouse.";
export const WEATHER = "What is the weather in Paris?";
export const PERSON = "Describe Ada, an engineer who speaks English.";
export const Person = z.object({
  name: z.string().max(20),
  role: z.enum(["engineer", "painter"]),
  born: z.iso.date(),
  languages: z.array(z.enum(["de", "en", "fr"])).max(3),
});
export { assert, z };

/** Runs the parts of a program, and prints the name of each that has succeeded. */
export async function run(program, parts) {
  for (const part of parts) {
    await part();
    console.log(`  ${program}: ${part.name}`);
  }
}

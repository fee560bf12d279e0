// Vercel's AI SDK: generateObject, tools and streams, over four providers; the default is responses.
// needs: ai @ai-sdk/openai @ai-sdk/openai-compatible @ai-sdk/anthropic zod
import assert from "node:assert/strict";
import test from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { URL: url, SCRIPTED_URL, MODEL, EMBEDDING_MODEL } = process.env;
const Verdict = z.object({ verdict: z.enum(["good", "bad"]), score: z.number().int() });
const script = 'CALL get_weather {"city": "Vaasa"}\nSAY Sun.';
const options = (base) => ({ baseURL: base + "/v1", apiKey: "none" });
const providers = {
  responses: (base) => createOpenAI(options(base))(MODEL),
  chat: (base) => createOpenAI(options(base)).chat(MODEL),
  compatible: (base) =>
    createOpenAICompatible({
      ...options(base), name: "local", supportsStructuredOutputs: true, includeUsage: true,
    })(MODEL),
  messages: (base) => createAnthropic(options(base))(MODEL),
};

function tools(called) {
  return {
    get_weather: tool({
      description: "Weather of a city",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => {
        called.push(city);
        return { weather: "sunny" };
      },
    }),
  };
}

for (const [name, make] of Object.entries(providers)) {
  test(`${name}: an object`, async () => {
    const { output } = await generateText({
      model: make(url), prompt: "Is bread good?", output: Output.object({ schema: Verdict }), maxRetries: 0,
    });
    assert.ok(Number.isInteger(output.score));
  });

  test(`${name}: generateObject`, async () => {
    const { object } = await generateObject({
      model: make(url), prompt: "Is bread good?", schema: Verdict, maxRetries: 0,
    });
    assert.ok(Number.isInteger(object.score));
  });

  test(`${name}: tools`, async () => {
    const called = [];
    const { text, usage } = await generateText({
      model: make(SCRIPTED_URL), prompt: script, tools: tools(called), stopWhen: stepCountIs(3), maxRetries: 0,
    });
    assert.deepEqual([text, called], ["Sun.", ["Vaasa"]]);
    assert.ok(usage.outputTokens > 0);
  });

  test(`${name}: tools, streamed`, async () => {
    const called = [];
    const result = streamText({
      model: make(SCRIPTED_URL), prompt: script, tools: tools(called), stopWhen: stepCountIs(3), maxRetries: 0,
    });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    assert.deepEqual([text, called], ["Sun.", ["Vaasa"]]);
  });
}

test("embeddings", async () => {
  const model = createOpenAI(options(url)).embedding(EMBEDDING_MODEL);
  const { embeddings } = await embedMany({ model, values: ["one", "two"], maxRetries: 0 });
  assert.equal(embeddings.length, 2);
});

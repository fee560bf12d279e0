// OpenAI's SDK for JavaScript: parse, runTools, streams, responses.
// needs: openai zod
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const { URL: url, SCRIPTED_URL, MODEL: model } = process.env;
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const scripted = new OpenAI({ baseURL: SCRIPTED_URL + "/v1", apiKey: "none", maxRetries: 0 });
const Verdict = z.object({ verdict: z.enum(["good", "bad"]), score: z.number().int() });
const messages = [{ role: "user", content: "Is bread good?" }];
const script = 'CALL get_weather {"city": "Turku"}\nSAY Sun.';

function tools(called) {
  return [
    {
      type: "function",
      function: {
        name: "get_weather",
        parse: JSON.parse,
        parameters: { type: "object", properties: { city: { type: "string" } } },
        function: ({ city }) => {
          called.push(city);
          return "sunny";
        },
      },
    },
  ];
}

test("parse", async () => {
  const answer = await client.chat.completions.parse({
    model, messages, response_format: zodResponseFormat(Verdict, "verdict"),
  });
  assert.equal(typeof answer.choices[0].message.parsed.score, "number");
});

for (const stream of [false, true]) {
  test(`runTools, stream: ${stream}`, async () => {
    const called = [];
    const runner = scripted.chat.completions.runTools({
      model, messages: [{ role: "user", content: script }], tools: tools(called), stream,
    });
    assert.equal(await runner.finalContent(), "Sun.");
    assert.deepEqual(called, ["Turku"]);
  });
}

test("responses.parse", async () => {
  const answer = await client.responses.parse({
    model, input: "Is bread good?", text: { format: zodTextFormat(Verdict, "verdict") },
  });
  assert.equal(typeof answer.output_parsed.score, "number");
});

test("responses.stream", async () => {
  const stream = scripted.responses.stream({ model, input: "SAY Hello." });
  let text = "";
  stream.on("response.output_text.delta", (event) => (text += event.delta));
  const final = await stream.finalResponse();
  assert.equal(text, "Hello.");
  assert.equal(final.output_text, "Hello.");
});

// Settings as typed, and what they mean in a request.
import { chat as words } from "../words/chat.js";

export const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.05, placeholder: "0.7" },
  top_p: { min: 0, max: 1, step: 0.01, placeholder: "0.9" },
  max_tokens: { min: 1, step: 1, placeholder: "512" },
  seed: { step: 1, placeholder: words.settings.random },
  min_p: { min: 0, max: 1, step: 0.01, placeholder: "0" },
  repetition_penalty: { min: 0.1, max: 2, step: 0.05, placeholder: "1" },
  presence_penalty: { min: -2, max: 2, step: 0.1, placeholder: "0" },
  frequency_penalty: { min: -2, max: 2, step: 0.1, placeholder: "0" },
};

const number = (text) => (text === "" || text === undefined || !Number.isFinite(Number(text)) ? undefined : Number(text));

function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(words.settings.noJson(what, error.message));
  }
}

/** `response_format` of the text: a schema of JSON, or the field itself. Throws Error in words. */
export function formOf(text) {
  if (!text?.trim()) return undefined;
  const value = parsed(text, words.settings.form);
  if (!value || typeof value !== "object" || Array.isArray(value)) throw new Error(words.settings.noSchema);
  if (["json_schema", "json_object", "text"].includes(value.type)) return value;
  return { type: "json_schema", json_schema: { name: "answer", schema: value.schema ?? value } };
}

/** `tools` of the text: a list or one, with or without the frame {type, function}. Throws Error in words. */
export function toolsOf(text) {
  if (!text?.trim()) return undefined;
  const value = parsed(text, words.settings.tools);
  const list = Array.isArray(value) ? value : Array.isArray(value?.tools) ? value.tools : [value];
  const tools = list.map((tool) => (tool?.function ? { type: "function", ...tool } : { type: "function", function: tool }));
  if (!tools.length || !tools.every((tool) => typeof tool.function?.name === "string")) throw new Error(words.settings.noTools);
  return tools;
}

/** The fields of a request; throws Error where a text is not what it should be. */
export function fieldsOf(settings) {
  const fields = Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, number(settings[name])]));
  const stops = (settings.stop ?? "").split("\n").filter(Boolean);
  return {
    ...fields,
    stop: stops.length ? stops : undefined,
    response_format: formOf(settings.form),
    tools: toolsOf(settings.tools),
    reasoning_effort: settings.thinks || undefined,
  };
}

/** What the composer says about settings that were changed. */
export function summary(settings) {
  const said = [
    settings.temperature && words.settings.sayTemperature(settings.temperature),
    settings.seed && words.settings.saySeed(settings.seed),
    settings.system?.trim() && words.settings.saySystem,
    settings.form?.trim() && words.settings.sayForm,
    settings.tools?.trim() && words.settings.sayTools,
  ];
  return said.filter(Boolean).join(", ");
}

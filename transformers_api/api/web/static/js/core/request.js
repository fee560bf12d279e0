// The request that made a panel, as others would write it.
const requests = new Map();

/** Note what was asked for `panel`. */
export const remember = (panel, request) => requests.set(panel, request);
export const recall = (panel) => requests.get(panel) ?? null;

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const pretty = (body) => JSON.stringify(body, null, 2);

/** A command of a shell. `keyed`: with a key, which is never written out. */
export function asCurl({ method, path, body }, keyed) {
  const parts = [`curl ${quoted(location.origin + path)}`];
  if (body?.stream) parts[0] = parts[0].replace("curl ", "curl -N ");
  if (method !== "GET" && !(method === "POST" && body !== undefined)) parts.push(`-X ${method}`);
  if (keyed) parts.push('-H "Authorization: Bearer $API_KEY"');
  if (method !== "GET") parts.push("-H 'Content-Type: application/json'");
  if (body !== undefined) parts.push(`-d ${quoted(pretty(body))}`);
  return parts.join(" \\\n  ");
}

/** A value as Python writes it. */
export function python(value, indent = "") {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = `${indent}    `;
  const items = Array.isArray(value)
    ? value.map((item) => python(item, inner))
    : Object.entries(value).filter(([, item]) => item !== undefined).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, inner)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (!items.length) return open + close;
  const line = `${open}${items.join(", ")}${close}`;
  return line.length <= 88 && !line.includes("\n") ? line : `${open}\n${items.map((item) => inner + item).join(",\n")},\n${indent}${close}`;
}

const SDK = { "/v1/chat/completions": "chat.completions", "/v1/completions": "completions", "/v1/embeddings": "embeddings" };
// All else goes into extra_body.
const ARGUMENTS = new Set([
  "model", "messages", "prompt", "input", "temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty",
  "response_format", "tools", "reasoning_effort", "stream", "stream_options", "n", "logprobs", "echo", "suffix", "dimensions", "encoding_format",
]);

export function asPython({ method, path, body }, keyed) {
  const secret = keyed ? 'os.environ["API_KEY"]' : '"none"';
  const imports = keyed ? "import os\n\n" : "";
  if (!SDK[path]) {
    const headers = keyed ? '    headers={"Authorization": f"Bearer {os.environ[\'API_KEY\']}"},\n' : "";
    const sent = body === undefined ? "" : `    json=${python(body, "    ")},\n`;
    return `${imports}import httpx\n\nanswer = httpx.request(\n    ${JSON.stringify(method)},\n    ${JSON.stringify(location.origin + path)},\n${headers}${sent}    timeout=None,\n)\nprint(answer.json())`;
  }
  const given = Object.entries(body).filter(([name, value]) => value !== undefined && ARGUMENTS.has(name)).map(([name, value]) => `    ${name}=${python(value, "    ")},\n`);
  const extra = Object.fromEntries(Object.entries(body).filter(([name, value]) => value !== undefined && !ARGUMENTS.has(name)));
  if (Object.keys(extra).length) given.push(`    extra_body=${python(extra, "    ")},\n`);
  const chunk = path === "/v1/completions" ? "chunk.choices[0].text" : 'chunk.choices[0].delta.content or ""';
  const reading = body.stream
    ? `for chunk in answer:\n    if chunk.choices:\n        print(${chunk}, end="", flush=True)`
    : "print(answer)";
  return `${imports}from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=${secret})\nanswer = client.${SDK[path]}.create(\n${given.join("")})\n${reading}`;
}

export function asJavaScript({ method, path, body }, keyed) {
  const headers = [...(method === "GET" ? [] : ['"content-type": "application/json"']), ...(keyed ? ["authorization: `Bearer ${key}`"] : [])];
  const options = [
    ...(method === "GET" ? [] : [`  method: ${JSON.stringify(method)},`]),
    ...(headers.length ? [`  headers: { ${headers.join(", ")} },`] : []),
    ...(body === undefined ? [] : [`  body: JSON.stringify(${pretty(body).replaceAll("\n", "\n  ")}),`]),
  ];
  const call = options.length ? `fetch(${JSON.stringify(location.origin + path)}, {\n${options.join("\n")}\n})` : `fetch(${JSON.stringify(location.origin + path)})`;
  const reading = body?.stream
    ? "for await (const text of answer.body.pipeThrough(new TextDecoderStream())) {\n  console.log(text);\n}"
    : "console.log(await answer.json());";
  return `const answer = await ${call};\n${reading}`;
}

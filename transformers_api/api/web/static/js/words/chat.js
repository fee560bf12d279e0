// The words of the view Chat.
const percent = (share) => `${Math.round(100 * share)} %`;

function loading(status) {
  const { model, doing, stage, progress, last_load_s: last } = status.loading;
  if (stage === "waiting" && status.resident) return `${model} is next; ${status.resident.model} finishes its answers first`;
  const what = [doing && doing !== "loading" ? doing : "", progress > 0 ? percent(progress) : ""].filter(Boolean).join(", ");
  const usual = !what && last ? `, which took ${Math.max(1, Math.round(last))} s last time` : "";
  return `${model} is being loaded${what ? `: ${what}` : usual}`;
}

export const chat = {
  you: "You",
  model: "Model",
  toolResult: (name) => `Result of ${name}`,
  conversation: "Conversation",
  // Empty
  isReady: (model) => `${model} is ready.`,
  isLoading: (model) => `${model} is being loaded.`,
  noModel: "No model is in memory.",
  connecting: "Connecting to the server.",
  notThere: "The server does not answer.",
  aboutReady: "It runs on your own server, and nothing you write leaves it. Ask something, then look inside: what it nearly said, what it read, how sure it was.",
  aboutLoading: "You can write already. Your message waits until the model is there.",
  aboutNoModel: (model) => `Your first message loads ${model ?? "the model that is chosen above"}.`,
  aboutNotThere: "The page tries again by itself. What you write stays here.",
  specimen: "The model reads France and capital as it writes Paris",
  starters: [
    ["What is the capital of France?", "See where the answer comes from", "What is the capital of France?"],
    ["Write a Python function", "Count the vowels in a word", "Write a short Python function that counts the vowels in a word. Explain it in one sentence."],
    ["Tell me a story", "Watch the surprisal rise and fall", "Tell me a story about a lighthouse keeper."],
    ["Name three things to see in Paris", "Then force another first word", "Name three things to see in Paris, as a numbered list."],
  ],
  startersHint: "These four are asked at temperature 0, so that the answer is the same each time.",
  // While it waits: true sentences, from /status
  waiting({ status, reach, model, seconds }) {
    const late = seconds >= 10 ? ` (${seconds} s)` : "";
    if (reach === "no") return `The server does not answer. Trying again.${late}`;
    const resident = status?.resident;
    if (status?.loading) return loading(status) + late;
    if (model && resident && model !== resident.model) return `${model} is next; ${resident.model} finishes its answers first${late}`;
    if (model && status && !resident && !status.isPartial) return `${model} is about to be loaded${late}`;
    if (resident?.waiting > 0) {
      const many = resident.running === 1 ? "1 answer is" : `${resident.running} answers are`;
      return `Waiting for a place: ${many} being written, ${resident.waiting} ${resident.waiting === 1 ? "waits" : "wait"}${late}`;
    }
    return `Reading your message${late}`;
  },
  // Under an answer
  tokens: (count) => (count === 1 ? "token" : "tokens"),
  perSecond: "tokens/s",
  toFirst: "to the first",
  read: (cached) => (cached ? `read, ${cached} from the cache` : "read"),
  writingNow: (tokens, speed) => (speed ? `${tokens} tokens, ${speed} tokens/s` : `${tokens} tokens`),
  stopped: "You stopped it here.",
  cut: "It stopped at the token limit.",
  unfinished: "It was not finished.",
  goOn: "Continue",
  branch: "branch",
  askedChanged: (n) => `Asked of the model with the ${n === 1 ? "edit" : `${n} edits`} of this answer.`,
  changedBy: (n) => `changed by ${n} edit${n === 1 ? "" : "s"}`,
  thinking: "Thinking",
  thought: (ms) => (ms === undefined ? "Thought" : `Thought for ${Math.max(1, Math.round(ms / 1000))} s`),
  blind: (code) => (code === "trace_busy"
    ? "Written without a trace: others are being looked into. Look inside works now that it is finished."
    : "Written without a trace. Look inside asks the model again, about exactly these tokens."),
  ribbon: (count) => `Surprisal of ${count} ${count === 1 ? "token" : "tokens"}: look inside`,
  ribbonTip: "How surprising each token was to the model. Click to look inside.",
  lookInside: "Look inside",
  copy: "Copy",
  copied: "Copied",
  edit: "Edit",
  regenerate: "Regenerate",
  showRequest: "Show the request",
  fromHere: "New chat from here",
  versions: "Versions",
  previousVersion: "Previous version",
  nextVersion: "Next version",
  compare: "Compare versions",
  compared: "Compared versions",
  keepThis: "Keep this one",
  kept: "Kept",
  fullWidth: "Full width",
  editMessage: "Edit message",
  cancel: "Cancel",
  sendVersion: "Send as a new version",
  noText: (name) => `${name} is no text file.`,
  // Code and maths
  copyCode: "Copy code",
  plainText: "text",
  image: "image",
  task: "task",
  // Calls
  call: (name) => `Call of ${name}`,
  resultLabel: (name) => `Result of ${name}`,
  resultHint: "Answer in its place: what you write goes back to the model.",
  sendResults: (count) => (count === 1 ? "Send the result" : "Send the results"),
  // Speech
  saidWaiting: "Waiting for the model",
  saidStopped: "Stopped",
  saidCut: (count) => `Answer cut at ${count} tokens`,
  saidComplete: (count) => `Answer complete, ${count} ${count === 1 ? "token" : "tokens"}`,
  // Failures: a title in plain words, the server's sentence, ways on
  failure({ status, code }) {
    if (status === 401) return { title: "This server wants an API key", key: true };
    if (status === 403) return { title: "This key may not do that", key: true };
    if (status === 404) return { title: "The model is not there", models: true };
    if (code === "context_length_exceeded") return { title: "The conversation is too long for this model", restart: true };
    if (status === 413) return { title: "The message is too long", restart: true };
    if (status === 429) return { title: code === "rate_limited" ? "Too many requests" : "Too many are waiting" };
    if (status === 503 || status === 507) return { title: "The model cannot answer now", models: true };
    if (["unreachable", "offline", "broken"].includes(code)) return { title: "The connection is lost" };
    if (code === "refused_here") return { title: "A setting is not what it should be", settings: true };
    if (status >= 500 || status === 200) return { title: "The server made a mistake" };
    return { title: "The request was refused", settings: status === 400 };
  },
  retryIn: (seconds) => `You can try again in ${seconds} s.`,
  tryAgain: "Try again",
  enterKey: "Enter a key",
  showModels: "Show models",
  openSettings: "Open the settings",
  restart: "New chat from the last message",
  // Settings
  settings: {
    title: "Settings",
    system: "System message",
    systemHint: "How the model should behave",
    temperature: ["Temperature", "0 always takes the likeliest"],
    top_p: ["Top p", "share of probability kept"],
    max_tokens: ["Longest answer", "in tokens"],
    seed: ["Seed", "the same seed, the same answer"],
    random: "random",
    more: "More",
    min_p: ["Min p", "share of the likeliest"],
    repetition_penalty: ["Repetition penalty", "1 is none"],
    presence_penalty: ["Presence penalty", "0 is none"],
    frequency_penalty: ["Frequency penalty", "0 is none"],
    stop: ["Stop at", "a text on each line"],
    form: "JSON schema",
    formHint: "The answer has this form, whatever the model.",
    formExample: '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
    tools: "Tools",
    toolsHint: "Functions the model may ask for. You answer in their place.",
    toolsExample: '[{"name": "get_weather", "description": "The weather in a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]',
    thinks: "Thinking",
    thinksOptions: [["", "as the model does"], ["none", "answer at once"], ["low", "little"], ["medium", "some"], ["high", "much"]],
    reset: "Reset",
    done: "Done",
    noJson: (what, message) => `${what}: this is no JSON. ${message}`,
    noSchema: "JSON schema: an object in braces is needed.",
    noTools: "Tools: each needs a name, as in {\"name\": \"get_weather\", …}.",
    sayTemperature: (value) => `temperature ${value}`,
    saySeed: (value) => `seed ${value}`,
    saySystem: "system message",
    sayForm: "JSON schema",
    sayTools: "tools",
  },
};

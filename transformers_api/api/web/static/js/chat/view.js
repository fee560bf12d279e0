// The view Chat: the conversation, the empty chat, the composer.
import { state, touch } from "../core/state.js";
import { startComposer } from "./composer.js";
import { startHello } from "./hello.js";
import { startLog } from "./log.js";

export function mount() {
  startHello();
  startLog();
  startComposer();
  if (state.chat) touch("chat");
}

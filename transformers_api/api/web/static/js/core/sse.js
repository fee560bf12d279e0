// Server-sent events of an answer to POST, which EventSource cannot ask for.
import { createParser } from "../../vendor/eventsource-parser.js";
import { brokenOff } from "./errors.js";

/** Call `take` with the JSON of every event until [DONE]. Throws what `take` throws, and Failure
 *  "broken" where the stream ends without it. */
export async function events(body, take) {
  let isDone = false;
  const parser = createParser({
    onEvent(event) {
      if (event.data === "[DONE]") isDone = true;
      else take(JSON.parse(event.data));
    },
  });
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      parser.feed(value);
    }
  } catch (error) {
    reader.cancel().catch(() => {});
    throw error instanceof TypeError ? brokenOff() : error; // the network's errors are TypeErrors
  }
  if (!isDone) throw brokenOff();
}

// Failures: three shapes of the API's errors become one.
import { common } from "../words/common.js";

/** A call that did not succeed. `status` is 0 where nothing answered; `code` is the API's, or
 *  "unreachable", "offline", "broken" (a stream without its end). */
export class Failure extends Error {
  constructor(status, message, { code = null, param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfter = retryAfter;
  }

  /** What is stored with a message. */
  get plain() {
    return { status: this.status, code: this.code, message: this.message, param: this.param, retryAfter: this.retryAfter };
  }
}

/** The failure in an answer of the API: `{error: {message, code}}`, `{error: "…", code}` or `{detail}`. */
export function refusal(status, body, headers = null) {
  const error = body?.error ?? body?.detail;
  const message = typeof error === "string" ? error : error?.message;
  const details = error && typeof error === "object" ? error : body;
  const seconds = Number(headers?.get("retry-after"));
  return new Failure(status, typeof message === "string" && message ? message : common.answered(status), {
    code: typeof details?.code === "string" ? details.code : null,
    param: typeof details?.param === "string" ? details.param : null,
    retryAfter: Number.isFinite(seconds) && seconds > 0 ? Math.ceil(seconds) : null,
  });
}

/** The failure to reach the server at all. */
export function unreachable() {
  return navigator.onLine === false
    ? new Failure(0, common.offline, { code: "offline" })
    : new Failure(0, common.noAnswer, { code: "unreachable" });
}

export const brokenOff = () => new Failure(0, common.brokenOff, { code: "broken" });

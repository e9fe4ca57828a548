/** The router's HTTP API as the page uses it: models, state, and streams that go on after a cut. */

import { readEvents } from "./sse.js";

const MOST_ATTEMPTS = 6;
const FIRST_PAUSE_MS = 300;
const MOST_PAUSE_MS = 5000;
const ASK_TIMEOUT_MS = 5000;
const KEY_PLACE = "fusionroute.key";
/** After a cut these may pass: the turn is still being put aside, or the router is just starting again. */
const PASSING_STATUS = new Set([409, 429, 502, 503]);
/** Statuses of errors that come in the middle of a stream, by their type. */
const STATUS_OF = { rate_limit_error: 429, conflict_error: 409, not_found_error: 404, invalid_request_error: 400 };

/** The server said no, in words. */
export class Refused extends Error {
  constructor(status, message, retryAfterSeconds = null) {
    super(message);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/** What went wrong, for a person. */
export function inWords(error) {
  if (!(error instanceof Refused)) return `The connection to the router was lost (${error.message}).`;
  const again = error.retryAfterSeconds ? ` Try again in ${error.retryAfterSeconds} s.` : "";
  if (error.status === 401 || error.status === 403) return "An API key is needed: put it into the settings.";
  if (error.status === 429) return `The router is busy: ${error.message}.${again}`;
  if (error.status === 503) return `Somebody is not there: ${error.message}.${again}`;
  if (error.status === 504) return `It took too long: ${error.message}.${again}`;
  return `${error.message}.${again}`.replace(/\.\.$/, ".");
}

export class Api {
  get key() {
    return sessionStorage.getItem(KEY_PLACE) ?? "";
  }

  set key(key) {
    if (key) sessionStorage.setItem(KEY_PLACE, key);
    else sessionStorage.removeItem(KEY_PLACE);
  }

  /** What is served: the entries of /v1/models. */
  async models() {
    return (await this.#get("v1/models")).data;
  }

  /** Live state of the experts. */
  state() {
    return this.#get("fusionroute/state");
  }

  /** Ends what is being written in a session, and forgets it. Whoever leaves the page need not wait. */
  async forget(sessionId) {
    await this.#ask(`fusionroute/sessions/${sessionId}`, { method: "DELETE", keepalive: true }).catch(() => {});
  }

  /**
   * The chunks of a streamed answer, which is written in a session of its own (`body.fusionroute.session_id`), so that
   * a cut connection can be taken up again where it broke.
   * @param {string} path
   * @param {object} body
   * @param {{signal: AbortSignal, lastId?: string, onCut?: () => void}} options `lastId`: go on behind this event
   * @returns {AsyncGenerator<{id: string, chunk: object}>}
   */
  async *stream(path, body, { signal, lastId = "", onCut = () => {} }) {
    const beginning = firstId(body);
    let numFailed = 0;
    for (;;) {
      try {
        const headers = lastId ? { "last-event-id": lastId } : {};
        const response = await this.#ask(path, {
          method: "POST",
          body: JSON.stringify(body),
          headers: { "content-type": "application/json", ...headers },
          signal,
        });
        for await (const { id, data } of readEvents(response.body)) {
          numFailed = 0;
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          if (chunk.error) throw new Refused(STATUS_OF[chunk.error.type] ?? 500, chunk.error.message);
          lastId = id || lastId;
          yield { id, chunk };
        }
        throw new TypeError("it ended in the middle of the answer");
      } catch (error) {
        numFailed += 1;
        const hasNotBegun = error.status === 404 && lastId === beginning;
        const mayPass = !(error instanceof Refused) || (lastId && PASSING_STATUS.has(error.status));
        if (signal.aborted || !(mayPass || hasNotBegun) || numFailed >= MOST_ATTEMPTS) throw error;
        lastId = hasNotBegun ? "" : lastId || beginning; // the question may have arrived before the cut
        onCut();
        await pause(Math.min(MOST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (numFailed - 1)), signal);
      }
    }
  }

  async #get(path) {
    return (await this.#ask(path, { signal: AbortSignal.timeout(ASK_TIMEOUT_MS) })).json();
  }

  async #ask(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.ok) return response;
    const seconds = Number(response.headers.get("retry-after")) || null;
    throw new Refused(response.status, await reasonOf(response), seconds);
  }
}

/** What stands for "from the first token on" where an event's id is asked for. */
export function firstId(body) {
  return `${body.fusionroute.session_id}:0`;
}

async function reasonOf(response) {
  try {
    const { error } = await response.json();
    return (error.message ?? String(error)).replace(/\.$/, "");
  } catch {
    return `the router answered ${response.status} ${response.statusText}`.trim();
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

/** The turns of the conversation: asking, writing down what comes, stopping, asking again. */

import { Answer } from "./answer.js";
import { firstId, inWords } from "./api.js";
import { keep, recall } from "./keeping.js";
import { make } from "./looks.js";

const ENDINGS = {
  stop: "",
  length: "The limit of tokens was reached.",
  stopped: "Stopped.",
  cancelled: "Stopped.",
};

export class Conversation {
  /** Aborts the answer under way; null while there is none. */
  #running = null;
  #atEnd = true;
  #scrolling = 0;

  /**
   * @param {import("./api.js").Api} api
   * @param {import("./looks.js").Looks} looks
   * @param {() => void} onChange is called when an answer begins, ends, or turns come or go
   */
  constructor(api, looks, onChange) {
    this.api = api;
    this.looks = looks;
    this.onChange = onChange;
    this.element = document.getElementById("conversation");
    this.list = document.getElementById("turns");
    this.turns = [];
    const end = document.getElementById("end");
    const watch = new IntersectionObserver(([entry]) => (this.#atEnd = entry.isIntersecting), {
      root: this.element,
      rootMargin: "0px 0px 60px 0px",
    });
    watch.observe(end);
    addEventListener("pagehide", () => keep(this.turns));
  }

  get isRunning() {
    return this.#running !== null;
  }

  /** Puts back what an earlier load of the page had, and goes on with an answer that was under way. */
  restore() {
    let answer = null;
    for (const turn of recall()) {
      this.turns.push(turn);
      answer = this.#place(turn);
      this.#conclude(answer);
    }
    this.#follow(true);
    const last = this.turns.at(-1);
    if (last && last.ending === undefined) {
      last.lastId ??= firstId(last.body);
      this.#write(answer);
    }
    this.onChange();
  }

  /**
   * Asks.
   * @param {string} prompt
   * @param {{path: string, body: object, rule: string}} request without the prompt
   */
  ask(prompt, { path, body, rule }) {
    const extension = { ...body.fusionroute, session_id: newSessionId() };
    const whole = { ...this.#withPrompt(prompt, path, body), fusionroute: extension };
    const turn = { prompt, path, rule, seed: body.seed, tokens: [], body: whole };
    this.turns.push(turn);
    this.#atEnd = true;
    return this.#write(this.#place(turn));
  }

  /** Asks for the last answer again, with the settings as they are now. */
  askAgain(request) {
    const turn = this.turns.pop();
    this.#forget(turn);
    this.list.lastElementChild.remove();
    return this.ask(turn.prompt, request);
  }

  stop() {
    if (this.#running === null) return;
    this.#running.abort();
    this.#forget(this.turns.at(-1));
  }

  clear() {
    this.#running?.abort();
    this.turns.forEach((turn) => this.#forget(turn));
    this.turns = [];
    this.list.replaceChildren();
    keep(this.turns);
    this.onChange();
  }

  #forget(turn) {
    this.api.forget(turn.body.fusionroute.session_id);
  }

  #withPrompt(prompt, path, body) {
    if (!path.endsWith("chat/completions")) return { ...body, prompt, stream: true };
    const messages = this.turns
      .filter((turn) => turn.answered)
      .flatMap((turn) => [
        { role: "user", content: turn.prompt },
        { role: "assistant", content: turn.answered },
      ]);
    return { ...body, messages: [...messages, { role: "user", content: prompt }], stream: true };
  }

  #place(turn) {
    const answer = new Answer(this.looks, turn);
    const element = make("div", "turn");
    element.append(make("p", "prompt", turn.prompt), answer.element);
    this.list.append(element);
    return answer;
  }

  async #write(answer) {
    const { turn } = answer;
    const running = new AbortController();
    this.#running = running;
    answer.element.setAttribute("aria-busy", "true");
    answer.tell(answer.isEmpty ? "Waiting for the first token …" : "Going on …");
    this.onChange();
    try {
      const options = { signal: running.signal, lastId: turn.lastId, onCut: () => answer.tell("Connecting again …") };
      for await (const { id, chunk } of this.api.stream(turn.path, turn.body, options)) {
        this.#take(answer, id, chunk);
      }
      turn.ending ??= "stop";
    } catch (error) {
      turn.ending = running.signal.aborted ? "stopped" : "error";
      turn.error = running.signal.aborted ? undefined : inWords(error);
    }
    answer.element.removeAttribute("aria-busy");
    if (this.#running === running) this.#running = null;
    this.#conclude(answer);
    keep(this.turns);
    this.#follow();
    this.onChange();
  }

  #take(answer, id, chunk) {
    const { turn } = answer;
    const choice = chunk.choices?.[0];
    if (id) turn.lastId = id;
    if (!choice) return;
    const extension = choice.fusionroute ?? {};
    const tokens = extension.tokens ?? [];
    const text = choice.delta?.content ?? choice.text ?? "";
    if (tokens.length) {
      answer.tell("");
      answer.add(tokens);
    }
    const inTokens = tokens.reduce((total, token) => total + token.text.length, 0);
    if (text.length > inTokens) answer.addTail(text.slice(inTokens));
    if (extension.statistics) turn.statistics = extension.statistics;
    if (choice.finish_reason) turn.ending = choice.finish_reason;
    this.#follow();
  }

  #conclude(answer) {
    const { turn } = answer;
    turn.answered = turn.ending === "error" && answer.isEmpty ? "" : answer.text;
    if (turn.ending === "error") {
      answer.tell(turn.error, "error");
      if (turn.lastId) answer.note.append(" ", this.#goOnButton(answer));
    } else if (answer.isEmpty && turn.ending) answer.tell("The answer is empty.");
    else answer.tell(ENDINGS[turn.ending] ?? "");
    answer.shares.conclude(turn);
  }

  /** What broke off can be continued where it stands. */
  #goOnButton(answer) {
    const button = make("button", "go-on", "Go on");
    button.type = "button";
    button.addEventListener("click", () => {
      if (this.isRunning) return;
      delete answer.turn.ending;
      delete answer.turn.tokensPerSecond; // the pause is not the models'
      this.#write(answer);
    });
    return button;
  }

  /** Keeps the end in sight for whoever was looking at it, once a frame at most. */
  #follow(always = false) {
    if (this.#scrolling || !(this.#atEnd || always)) return;
    this.#scrolling = requestAnimationFrame(() => {
      this.#scrolling = 0;
      this.element.scrollTop = this.element.scrollHeight;
    });
  }
}

function newSessionId() {
  const words = crypto.getRandomValues(new Uint32Array(4));
  return `page-${Array.from(words, (word) => word.toString(16).padStart(8, "0")).join("")}`;
}

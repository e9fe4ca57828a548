/** Who wrote how much of an answer, how fast it came, and how many tokens are not their expert's own choice. */

import { make, percent, say } from "./looks.js";
import { differs } from "./token_text.js";

const REDRAW_MS = 200;

export class Shares {
  #counts = new Map();
  #numTokens = 0;
  #numDiffering = 0;
  #firstAt = 0;
  #lastAt = 0;
  #timer = 0;
  #parts = new Map();

  /**
   * @param {import("./looks.js").Looks} looks
   * @param {() => void} goToDiffering is called when somebody asks for the next differing token
   */
  constructor(looks, goToDiffering) {
    this.looks = looks;
    this.element = make("footer", "shares");
    this.element.hidden = true;
    this.bar = make("div", "bar");
    this.bar.setAttribute("aria-hidden", "true");
    this.list = make("ul", "share-list");
    this.list.setAttribute("aria-label", "Share of each expert");
    this.facts = make("p", "facts");
    this.speed = make("span");
    this.differing = make("button", "differing");
    this.differing.type = "button";
    this.differing.title = "Go to the next one";
    this.differing.addEventListener("click", goToDiffering);
    this.statistics = make("span", "statistics");
    this.facts.append(this.speed, this.differing, this.statistics);
    this.element.append(this.bar, this.list, this.facts);
  }

  get numTokens() {
    return this.#numTokens;
  }

  /** Counts one more token; is drawn a little later, together with others. */
  count(token) {
    this.#counts.set(token.expert, (this.#counts.get(token.expert) ?? 0) + 1);
    this.#numTokens += 1;
    this.#numDiffering += differs(token) ? 1 : 0;
    this.#lastAt = performance.now();
    this.#firstAt ||= this.#lastAt;
    this.#timer ||= setTimeout(() => this.draw(), REDRAW_MS);
  }

  /** Tokens per second from the first one's arrival to the last one's; null before there are two. */
  get tokensPerSecond() {
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    return seconds > 0.001 ? (this.#numTokens - 1) / seconds : null;
  }

  /** Shows how fast it was as the turn remembers it, and what the server counted. */
  conclude(turn) {
    const { total_seconds: seconds } = turn.statistics ?? {};
    turn.tokensPerSecond ??= seconds ? this.#numTokens / seconds : this.tokensPerSecond;
    this.kept = turn.tokensPerSecond;
    const drafts = turn.statistics?.drafting ?? [];
    const sum = (name) => drafts.reduce((total, each) => total + Number(each[name] ?? 0), 0);
    const parts = [];
    if (drafts.length) parts.push(`${sum("num_accepted_tokens")} of ${sum("num_drafted_tokens")} drafts accepted`);
    const firstSeconds = turn.statistics?.first_token_seconds;
    if (firstSeconds) parts.push(`first token after ${Math.round(firstSeconds * 1000)} ms`);
    if (turn.seed !== undefined) parts.push(`seed ${turn.seed}`);
    if (turn.rule) parts.push(`rule ${turn.rule}`);
    say(this.statistics, parts.join(" · "));
    this.draw();
  }

  /** Draws the counts as they are now. */
  draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.element.hidden = this.#numTokens === 0;
    for (const [slot, count] of this.#counts) this.#drawPart(slot, count);
    const pace = this.kept ?? this.tokensPerSecond;
    const speed = pace === null || pace === undefined ? "" : `, ${pace.toFixed(1)} tokens/s`;
    say(this.speed, `${this.#numTokens} ${this.#numTokens === 1 ? "token" : "tokens"}${speed}`);
    const one = this.#numDiffering === 1;
    say(this.differing, `• ${this.#numDiffering} not the expert's own ${one ? "choice" : "choices"}`);
    this.differing.hidden = this.#numDiffering === 0;
  }

  #drawPart(slot, count) {
    let part = this.#parts.get(slot);
    if (!part) {
      const { style, letter } = this.looks.of(slot);
      part = { segment: make("span", style, letter), item: make("li"), text: make("span") };
      part.item.append(this.looks.sign(slot), part.text);
      this.#parts.set(slot, part);
      this.bar.append(part.segment);
      this.list.append(part.item);
    }
    part.segment.style.flexGrow = count;
    say(part.text, ` ${count} (${percent(count / this.#numTokens)})`);
  }
}

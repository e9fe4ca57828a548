/** The side panel: who serves which slot right now. Looks each second while the page is seen, rarely while not. */

import { inWords, Refused } from "./api.js";
import { epochTime, make, say } from "./looks.js";

const SEEN_MS = 1000;
const HIDDEN_MS = 20_000;
const MOST_MS = 10_000;
const MOST_CHANGES = 5;

export class Experts {
  #items = new Map();
  #before = null;
  #pause = SEEN_MS;
  #timer = 0;
  #wasLost = false;

  /**
   * @param {import("./api.js").Api} api
   * @param {import("./looks.js").Looks} looks
   */
  constructor(api, looks) {
    this.api = api;
    this.looks = looks;
    this.list = document.getElementById("slots");
    this.routerLoad = document.getElementById("router-load");
    this.changes = document.getElementById("changes");
    this.news = document.getElementById("news");
    document.addEventListener("visibilitychange", () => this.lookNow());
  }

  /** Looks at once and goes on looking. */
  lookNow() {
    clearTimeout(this.#timer);
    this.#pause = SEEN_MS;
    return this.#look();
  }

  async #look() {
    try {
      this.#show(await this.api.state());
      this.#pause = SEEN_MS;
    } catch (error) {
      this.#pause = Math.min(MOST_MS, this.#pause * 2);
      if (!this.#wasLost) this.#announce(inWords(error));
      this.#wasLost = true;
      if (error instanceof Refused && error.status === 401) this.#pause = MOST_MS;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), document.hidden ? HIDDEN_MS : this.#pause);
  }

  #show(state) {
    if (this.#wasLost) this.#announce("The router answers again.");
    this.#wasLost = false;
    for (const slot of state.slots) this.#showSlot(slot);
    for (const [name, { item }] of this.#items) item.hidden = !state.slots.some((each) => each.slot === name);
    const { num_running_turns: running, load } = state.router;
    say(
      this.routerLoad,
      `Router: ${running} ${running === 1 ? "answer" : "answers"} under way, ${load.queue_depth} waiting. ` +
        `Checkpoint ${(state.checkpoint_id || state.checkpoint).slice(0, 12)}.`,
    );
    if (this.#before) this.#compare(this.#before, state);
    this.#before = state;
  }

  #showSlot(slot) {
    let entry = this.#items.get(slot.slot);
    if (!entry) {
      entry = { item: make("li"), state: make("strong", "state"), facts: make("span", "slot-facts") };
      const line = make("span", "slot-line");
      line.append(this.looks.sign(slot.slot), entry.state);
      entry.item.append(line, entry.facts);
      this.#items.set(slot.slot, entry);
      this.list.append(entry.item);
    }
    say(entry.state, stateOf(slot));
    entry.state.dataset.state = slot.ready ? "ready" : "away";
    const others = [];
    if (slot.standby) others.push(`${slot.standby} on standby`);
    if (slot.draining && slot.ready) others.push(`${slot.draining} draining`);
    const { load } = slot;
    const parts = load
      ? [
          `${slot.model.split("/").pop()}, epoch ${epochTime(slot.epoch)}`,
          [`${load.num_sessions} sessions`, `${load.queue_depth} waiting`, ...others].join(", "),
        ]
      : [["nobody serves it", ...others].join(", ")];
    say(entry.facts, parts.join("\n"));
    entry.item.title = slot.address;
  }

  #compare(before, now) {
    for (const slot of now.slots) {
      const old = before.slots.find((each) => each.slot === slot.slot);
      if (!old) this.#announce(`${slot.slot}: new`);
      else if (slot.epoch && old.epoch && slot.epoch !== old.epoch) {
        this.#announce(`${slot.slot}: swapped, epoch ${epochTime(slot.epoch)}`);
      } else if (stateOf(old) !== stateOf(slot)) this.#announce(`${slot.slot}: ${stateOf(slot)}`);
      else if (old.standby !== slot.standby) this.#announce(`${slot.slot}: ${slot.standby} on standby`);
      else if (old.draining !== slot.draining) this.#announce(`${slot.slot}: ${slot.draining} draining`);
    }
    if (before.checkpoint !== now.checkpoint) this.#announce("the router has another checkpoint");
    if (now.promotion.error && now.promotion.error !== before.promotion.error) {
      this.#announce(`a promotion was refused: ${now.promotion.error}`);
    }
  }

  #announce(text) {
    const item = make("li");
    item.append(make("time", "", new Date().toLocaleTimeString("en-GB")), ` ${text}`);
    this.changes.prepend(item);
    say(this.news, text); // the list may be folded away, and then nobody would hear of it
    while (this.changes.childElementCount > MOST_CHANGES) this.changes.lastElementChild.remove();
  }
}

function stateOf(slot) {
  if (slot.ready) return "ready";
  return slot.draining ? "draining" : "not there";
}

/** What a person can choose: who writes, how a token is drawn, the seed, the key. Kept for this tab. */

import { make } from "./looks.js";

const PLACE = "fusionroute.settings";
const NUM_CANDIDATES = 5;
const SEEDS = 2 ** 32;
/** What each rule of fusion does; the others are modes of their own. */
const RULE_NOTES = {
  sum: "Expert and complement together: their scores are added.",
  gated_sum: "Expert and complement together: the complement as strong as each token needs it.",
  mixture: "Expert and router together: the mean of their probabilities, weighted by the gate.",
  select: "Whichever model the gate trusts most writes the token alone.",
};
const NOTES = {
  route: "The picked expert writes alone; the complement is left out.",
  router: "No expert is asked.",
  expert: "This expert writes alone; nothing is routed.",
};

const field = (id) => document.getElementById(id);

export class Settings {
  #rules = null;

  constructor() {
    this.form = field("settings-form");
    this.mode = field("mode");
    this.#restore();
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.#changed());
    this.#changed();
  }

  /**
   * Fills the list of modes.
   * @param {{slots: string[], rules: string[], default_rule: string}} offer
   */
  offer(offer) {
    const wanted = this.wantedMode ?? "fused";
    const option = (value, text) => {
      const made = make("option", "", text);
      made.value = value;
      return made;
    };
    const words = (rule) => rule.replace("_", " ");
    const fused = group("Fused", [option("fused", `fused (${words(offer.default_rule)})`)]);
    for (const rule of offer.rules) {
      if (rule in RULE_NOTES && rule !== offer.default_rule) fused.append(option(`fused:${rule}`, words(rule)));
    }
    const parts = group("One part only", [option("route", "routing only")]);
    parts.append(option("router", "router alone"));
    const single = group("One expert", offer.slots.map((slot) => option(`expert:${slot}`, slot)));
    this.mode.replaceChildren(fused, parts, single);
    this.mode.value = wanted;
    if (this.mode.value !== wanted) this.mode.value = "fused";
    this.#rules = offer;
    this.#changed();
  }

  /** The rule by which the next answer is written. */
  get rule() {
    const [kind, name] = this.mode.value.split(":");
    if (kind === "fused") return name ?? this.#rules?.default_rule ?? "sum";
    return kind === "router" ? "router" : "route";
  }

  /** The part of a request's body that the settings decide; draws a seed unless one is kept. */
  body() {
    if (!field("keep-seed").checked || field("seed").value === "") {
      field("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    }
    const sampled = this.form.elements.sampling.value === "sampled";
    const [kind, name] = this.mode.value.split(":");
    const extension = { details: true, num_candidates: NUM_CANDIDATES, combine: this.rule };
    if (kind === "expert") extension.expert = name;
    const body = { max_tokens: this.#number("max-tokens", 256), seed: this.#number("seed", 0) % SEEDS };
    body.temperature = sampled ? this.#number("temperature", 1) : 0;
    if (sampled) body.top_p = this.#number("top-p", 1);
    this.#changed();
    return { ...body, fusionroute: extension };
  }

  #number(id, otherwise) {
    const input = field(id);
    const value = input.valueAsNumber;
    if (Number.isNaN(value)) return otherwise;
    return Math.min(Number(input.max), Math.max(Number(input.min), value));
  }

  #changed() {
    const sampled = this.form.elements.sampling.value === "sampled";
    for (const id of ["temperature", "top-p"]) field(id).disabled = !sampled;
    field("mode-note").textContent = NOTES[this.mode.value.split(":")[0]] ?? RULE_NOTES[this.rule] ?? "";
    if (this.mode.value) this.wantedMode = this.mode.value;
    sessionStorage.setItem(
      PLACE,
      JSON.stringify({
        mode: this.wantedMode,
        sampling: this.form.elements.sampling.value,
        numbers: Object.fromEntries(NUMBERS.map((id) => [id, field(id).value])),
        keepSeed: field("keep-seed").checked,
      }),
    );
  }

  #restore() {
    const kept = JSON.parse(sessionStorage.getItem(PLACE) ?? "null");
    if (!kept) return;
    this.wantedMode = kept.mode;
    this.form.elements.sampling.value = kept.sampling;
    for (const id of NUMBERS) field(id).value = kept.numbers[id];
    field("keep-seed").checked = kept.keepSeed;
  }
}

const NUMBERS = ["temperature", "top-p", "max-tokens", "seed"];

function group(label, options) {
  const made = document.createElement("optgroup");
  made.label = label;
  made.append(...options);
  return made;
}

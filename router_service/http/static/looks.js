/** How each expert looks: a number for colour and underline (answers.css), and a letter, as in the terminal. */

const NUM_LOOKS = 8;
export const ROUTER_LETTER = "+";

export class Looks {
  #looks = new Map([[null, { letter: ROUTER_LETTER, name: "router alone", style: "router" }]]);

  /** The expert slots seen so far, in order. */
  get slots() {
    return [...this.#looks.keys()].filter((slot) => slot !== null);
  }

  /**
   * How a slot looks.
   * @param {string | null} slot null = the router writing alone
   * @returns {{letter: string, name: string, style: string}} `style` is the class that colours it
   */
  of(slot) {
    let look = this.#looks.get(slot);
    if (!look) {
      const taken = new Set([...this.#looks.values()].map((each) => each.letter));
      const letters = [...slot, ...slot.toUpperCase(), ..."0123456789"];
      const letter = letters.find((each) => /\S/.test(each) && !taken.has(each)) ?? "?";
      look = { letter, name: slot, style: `expert-${(this.#looks.size - 1) % NUM_LOOKS}` };
      this.#looks.set(slot, look);
    }
    return look;
  }

  /** A swatch with the letter, followed by the name. */
  sign(slot) {
    const look = this.of(slot);
    const sign = make("span", "sign");
    sign.append(make("span", `swatch ${look.style}`, look.letter), ` ${look.name}`);
    return sign;
  }
}

/** An element with classes and text. */
export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** Sets an element's text, touching nothing where it says so already. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A token's text so that blanks can be seen. */
export function visible(text) {
  if (text === "") return "(no text)";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** A share of one in percent. */
export function percent(share) {
  const value = share * 100;
  return value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(value < 10 ? 1 : 0)} %`;
}

/** An epoch is milliseconds since 1970 (a number of its own in tests); people read a time of day. */
export function epochTime(epoch) {
  return epoch > 1e12 ? new Date(epoch).toLocaleTimeString("en-GB") : String(epoch);
}

/** One answer on the page. Tokens are only ever appended: a token that stands is not touched again. */

import { epochTime, make } from "./looks.js";
import { Shares } from "./shares.js";
import { accessibleName, differs } from "./token_text.js";

export class Answer {
  /**
   * @param {import("./looks.js").Looks} looks
   * @param {object} turn what is kept of the turn (conversation.js)
   */
  constructor(looks, turn) {
    this.looks = looks;
    this.turn = turn;
    this.element = make("article", "answer");
    this.element.answer = this;
    this.tokens = make("div", "tokens");
    this.tokens.setAttribute("role", "group");
    this.tokens.setAttribute("aria-label", "Answer; arrow keys go from token to token");
    this.note = make("p", "turn-note");
    this.shares = new Shares(looks, () => this.nextDiffering());
    this.element.append(this.tokens, this.note, this.shares.element);
    this.epochs = new Map();
    this.lastExpert = undefined;
    const { tokens } = turn;
    turn.tokens = [];
    this.add(tokens);
    if (turn.tail) this.addTail(turn.tail);
  }

  get isEmpty() {
    return this.turn.tokens.length === 0;
  }

  /** The text that stands here. */
  get text() {
    return this.turn.tokens.map((token) => token.text).join("") + (this.turn.tail ?? "");
  }

  /** Appends what is new among these tokens; after a cut some may come twice. */
  add(tokens) {
    const piece = document.createDocumentFragment();
    for (const token of tokens) {
      if (token.index < this.turn.tokens.length) continue;
      this.turn.tokens.push(token);
      this.#markSwap(token, piece);
      piece.append(this.#span(token));
      this.shares.count(token);
    }
    this.tokens.append(piece);
  }

  /** Appends text that belongs to no token of its own: what was held back until the end. */
  addTail(text) {
    this.turn.tail = text;
    this.tokens.append(make("span", "tail", text));
  }

  /** Says below the answer how it ended, or what goes on. */
  tell(text, kind = "") {
    if (!text && !this.note.hasChildNodes()) return;
    this.note.className = `turn-note ${kind}`;
    this.note.replaceChildren(...(text ? [kind === "error" ? make("strong", "", "Error: ") : "", text] : []));
    if (kind === "error") this.note.setAttribute("role", "alert");
    else this.note.removeAttribute("role");
  }

  /** Goes to the next token that is not what its expert would have written. */
  nextDiffering() {
    const found = [...this.tokens.querySelectorAll(".token.differs")];
    const here = found.indexOf(document.activeElement);
    found[(here + 1) % found.length]?.focus();
  }

  #span(token) {
    const look = this.looks.of(token.expert);
    const span = make("span", `token ${look.style}`);
    span.append(...pieces(token.text));
    if (token.expert !== this.lastExpert) {
      span.classList.add("begins");
      span.dataset.letter = look.letter;
      this.lastExpert = token.expert;
    }
    if (differs(token)) span.classList.add("differs");
    if (token.degraded) span.classList.add("degraded");
    if (token.text === "") span.classList.add("without-text");
    span.dataset.index = token.index;
    span.tabIndex = token.index === 0 ? 0 : -1;
    span.setAttribute("role", "button");
    span.setAttribute("aria-label", accessibleName(token, look));
    return span;
  }

  /** A slot whose epoch has grown since its last token has been swapped meanwhile. */
  #markSwap(token, piece) {
    if (token.expert === null) return;
    const before = this.epochs.get(token.expert);
    this.epochs.set(token.expert, token.expert_epoch);
    if (before === undefined || before === token.expert_epoch) return;
    const mark = make("span", "swap", `⇄ ${token.expert} ${epochTime(token.expert_epoch)}`);
    mark.setAttribute("role", "note");
    mark.setAttribute("aria-label", `here ${token.expert} was swapped, epoch ${epochTime(token.expert_epoch)}`);
    piece.append(mark);
    this.lastExpert = undefined;
  }
}

/** Text whose newlines can be seen: a sign stands before each, which is not part of the text. */
function pieces(text) {
  return text.split(/(\n)/).map((piece) => (piece === "\n" ? make("span", "newline", piece) : piece));
}

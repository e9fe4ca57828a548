/** Everything about one token: who wrote it, how it was routed, what expert, complement and sum would have written. */

import { epochTime, make, percent, visible } from "./looks.js";
import { whyItDiffers } from "./token_text.js";

const COLUMNS = ["expert", "complement", "fused"];
const SUMS = new Set(["sum", "gated_sum"]);

export class Details {
  /** @param {import("./looks.js").Looks} looks */
  constructor(looks) {
    this.looks = looks;
    this.panel = document.getElementById("token");
    this.body = document.getElementById("token-body");
    this.shown = null;
  }

  /** Shows a token of an answer. */
  show(answer, token) {
    if (this.shown === token) return; // pointing at the token again
    this.shown = token;
    delete this.panel.dataset.empty;
    const parts = [this.#heading(token)];
    const why = whyItDiffers(token, answer.turn.rule);
    if (why) parts.push(make("p", "why", `• ${why}`));
    if (token.degraded) parts.push(make("p", "why", "The expert that the router had picked was not there."));
    parts.push(this.#weights(token), this.#candidates(token, answer.turn.rule));
    this.body.replaceChildren(...parts.filter(Boolean));
  }

  /** Shows nothing. */
  clear() {
    this.shown = null;
    this.panel.dataset.empty = "";
    this.body.replaceChildren();
  }

  #heading(token) {
    const heading = make("dl", "facts-of-token");
    const fact = (name, ...content) => {
      const description = make("dd");
      description.append(...content);
      const pair = make("div");
      pair.append(make("dt", "", name), description);
      heading.append(pair);
    };
    fact("Token", make("code", "token-text", visible(token.text)), ` no. ${token.index}, id ${token.id}`);
    fact("Written by", this.looks.sign(token.expert));
    if (token.expert !== null && token.expert_epoch) {
      const epoch = make("span", "", epochTime(token.expert_epoch));
      epoch.title = String(token.expert_epoch);
      fact("Epoch", epoch);
    }
    if (typeof token.logprob === "number") fact("Probability", percent(Math.exp(token.logprob)));
    return heading;
  }

  #weights(token) {
    const weights = Object.entries(token.weights ?? {});
    if (!weights.length) return null;
    const box = make("div");
    const list = make("ul", "weights");
    const wanted = token.expert ?? "router";
    for (const [slot, weight] of weights) {
      const known = slot === "router" ? null : slot;
      const item = make("li", slot === wanted ? "is-chosen" : "");
      const meter = make("span", `meter ${this.looks.of(known).style}`);
      const fill = make("span", "fill");
      fill.style.inlineSize = `${weight * 100}%`;
      meter.append(fill);
      item.append(this.looks.sign(known), meter, make("span", "number", percent(weight)));
      list.append(item);
    }
    box.append(make("h3", "", "Routing weights"), list);
    return box;
  }

  #candidates(token, rule) {
    const lists = COLUMNS.map((name) => token.top?.[name] ?? []);
    if (!lists.some((list) => list.length)) {
      return make("p", "note", "Candidates are not kept for tokens that were read back after a cut.");
    }
    const table = make("table");
    const head = table.createTHead().insertRow();
    const titles = ["Token", "Expert", "Complement", SUMS.has(rule) ? "Sum" : "Fused"];
    head.append(...titles.map((title) => cellOf("th", title)));
    const body = table.createTBody();
    for (const { id, text } of rowsOf(token, lists)) {
      const row = body.insertRow();
      const name = cellOf("th", "");
      name.append(make("code", "", visible(text)));
      if (id === token.id) {
        row.className = "is-chosen";
        name.append(make("span", "mark", " ✓ written"));
      }
      row.append(name, ...lists.map((list, index) => this.#cell(token, id, list, COLUMNS[index])));
    }
    const box = make("div");
    const scroll = make("div", "scroll");
    scroll.append(table);
    box.append(make("h3", "", "Candidates"), scroll);
    return box;
  }

  #cell(token, id, list, column) {
    const rank = list.findIndex((each) => each.id === id);
    if (rank < 0) return cellOf("td", list.length ? "–" : "");
    const probability = Math.exp(list[rank].logprob);
    const cell = cellOf("td", "");
    cell.append(make("span", "number", percent(probability)));
    if (rank === 0) {
      cell.classList.add("first");
      cell.append(make("span", "mark", " 1st"));
    }
    const meter = make("span", `meter ${this.#styleOf(token, column)}`);
    const fill = make("span", "fill");
    fill.style.inlineSize = `${probability * 100}%`;
    meter.append(fill);
    cell.append(meter);
    return cell;
  }

  #styleOf(token, column) {
    if (column === "fused") return "sum";
    return this.looks.of(column === "expert" ? token.expert : null).style;
  }
}

/** The candidates of all lists, the sum's order first; the token itself is always there. */
function rowsOf(token, lists) {
  const rows = new Map();
  for (const list of [lists[2], lists[0], lists[1]]) {
    for (const { id, text } of list) rows.set(id, { id, text });
  }
  if (!rows.has(token.id)) rows.set(token.id, { id: token.id, text: token.text });
  return rows.values();
}

function cellOf(tag, text) {
  const cell = make(tag, "", text);
  if (tag === "th") cell.scope = "col";
  return cell;
}

/** Puts the page together. */

import { Api, inWords, Refused } from "./api.js";
import { Conversation } from "./conversation.js";
import { Details } from "./details.js";
import { Experts } from "./experts.js";
import { Looks, make, say } from "./looks.js";
import { Settings } from "./settings.js";
import { walk } from "./walking.js";

const ASK_AGAIN_MS = 3000;
const WIDE = matchMedia("(min-width: 1000px)");

const field = (id) => document.getElementById(id);
const api = new Api();
const looks = new Looks();
const settings = new Settings();
const details = new Details(looks);
const experts = new Experts(api, looks);
const conversation = new Conversation(api, looks, showState);
const walking = walk(conversation.element, details);

/** What is served, as /v1/models says; null until it is known. */
let served = null;

function showState() {
  const { isRunning, turns } = conversation;
  const couldAsk = served !== null && !isRunning;
  field("send").hidden = isRunning;
  field("send").disabled = served === null;
  field("stop").hidden = !isRunning;
  field("regenerate").disabled = !couldAsk || !turns.length;
  field("clear").disabled = !turns.length;
  field("welcome").hidden = turns.length > 0;
  say(field("said"), isRunning ? "Writing" : turns.length ? `Answer: ${turns.at(-1).answered}` : "");
}

function request() {
  const path = served.fusionroute.has_chat_template ? "v1/chat/completions" : "v1/completions";
  return { path, rule: settings.rule, body: { model: served.id, ...settings.body() } };
}

function send() {
  const prompt = field("prompt").value;
  if (!prompt.trim() || conversation.isRunning || served === null) return;
  field("prompt").value = "";
  conversation.ask(prompt, request());
}

async function connect() {
  try {
    served = (await api.models())[0];
  } catch (error) {
    say(field("model"), inWords(error));
    if (error instanceof Refused && error.status === 401) return askForKey();
    setTimeout(connect, ASK_AGAIN_MS);
    return;
  }
  const offer = served.fusionroute;
  for (const slot of offer.slots) looks.of(slot);
  field("key-form").hidden = !api.key;
  const kind = offer.has_chat_template ? "chat" : "no chat template: each prompt is continued by itself";
  say(field("model"), `${served.id} · checkpoint ${offer.checkpoint.slice(0, 12)} · ${kind}`);
  field("legend").replaceChildren(
    ...[...offer.slots, null].map((slot) => {
      const item = make("li");
      item.append(looks.sign(slot));
      return item;
    }),
    make("li", "legend-differs", "• not the expert's own choice"),
  );
  settings.offer(offer);
  if (!conversation.turns.length) conversation.restore();
  showState();
  experts.lookNow();
}

function askForKey() {
  field("key-form").hidden = false;
  field("settings").open = true;
  field("key").focus();
}

field("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = field("key").value.trim();
  field("key").value = "";
  connect();
});
field("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
field("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
field("stop").addEventListener("click", () => {
  conversation.stop();
  field("prompt").focus();
});
field("regenerate").addEventListener("click", () => conversation.askAgain(request()));
field("clear").addEventListener("click", () => {
  conversation.clear();
  details.clear();
  field("prompt").focus();
});
field("close-token").addEventListener("click", closeToken);
field("token-before").addEventListener("click", () => walking.beside(-1));
field("token-after").addEventListener("click", () => walking.beside(1));
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (conversation.isRunning) conversation.stop();
  else closeToken();
});

function closeToken() {
  if (details.panel.contains(document.activeElement)) walking.back();
  walking.leave();
  details.clear();
}

/** Panels stand open where there is room for them, and are folded where there is none. */
function fold() {
  for (const id of ["settings", "experts"]) field(id).open = WIDE.matches;
}
WIDE.addEventListener("change", fold);
fold();
showState();
connect();

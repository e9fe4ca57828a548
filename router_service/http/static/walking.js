/** Going through the tokens of the answers by pointer, finger and keyboard. */

/**
 * Calls back for whichever token is looked at.
 * @param {HTMLElement} conversation holds the answers
 * @param {{show: (answer: object, token: object) => void}} details
 */
export function walk(conversation, details) {
  let chosen = null;
  const show = (element) => {
    const { answer } = element.closest(".answer");
    details.show(answer, answer.turn.tokens[Number(element.dataset.index)]);
  };
  const choose = (element) => {
    for (const old of element.parentElement.querySelectorAll('.token[tabindex="0"]')) old.tabIndex = -1;
    element.tabIndex = 0;
    chosen?.classList.remove("is-chosen");
    chosen = element;
    chosen.classList.add("is-chosen");
    show(element);
    element.scrollIntoView({ block: "nearest" });
  };
  const tokenOf = (event) => event.target.closest?.(".token");

  conversation.addEventListener("pointerover", (event) => {
    const element = tokenOf(event);
    if (event.pointerType === "mouse" && element) show(element);
  });
  conversation.addEventListener("pointerleave", () => {
    if (chosen?.isConnected) show(chosen);
  });
  conversation.addEventListener("click", (event) => tokenOf(event)?.focus());
  conversation.addEventListener("focusin", (event) => {
    const element = tokenOf(event);
    if (element) choose(element);
  });
  conversation.addEventListener("keydown", (event) => {
    const element = tokenOf(event);
    const next = element && !event.altKey && !event.ctrlKey && !event.metaKey && neighbour(element, event.key);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  return {
    /** Goes back to the token that was looked at. */
    back: () => chosen?.focus(),
    /** Looks at the token before (-1) or after (1), without going there. */
    beside(direction) {
      const next = chosen && step(chosen, direction < 0 ? "previousElementSibling" : "nextElementSibling");
      if (next) choose(next);
    },
    /** Looks at none any more. */
    leave() {
      chosen?.classList.remove("is-chosen");
      chosen = null;
    },
  };
}

function neighbour(element, key) {
  const all = element.parentElement.getElementsByClassName("token");
  switch (key) {
    case "ArrowRight":
      return step(element, "nextElementSibling");
    case "ArrowLeft":
      return step(element, "previousElementSibling");
    case "ArrowDown":
      return onOtherLine(element, "nextElementSibling");
    case "ArrowUp":
      return onOtherLine(element, "previousElementSibling");
    case "Home":
      return all[0];
    case "End":
      return all[all.length - 1];
    default:
      return null;
  }
}

/** The next token in a direction; marks of swaps are passed over. */
function step(element, direction) {
  let next = element[direction];
  while (next && !next.classList.contains("token")) next = next[direction];
  return next;
}

/** The token of the next line, in a direction, that stands nearest above or below. */
function onOtherLine(element, direction) {
  const here = element.getBoundingClientRect();
  let best = null;
  let line = null;
  for (let next = step(element, direction); next; next = step(next, direction)) {
    const there = next.getBoundingClientRect();
    const isOther = direction === "nextElementSibling" ? there.top > here.bottom - 2 : there.bottom < here.top + 2;
    if (!isOther) continue;
    if (line !== null && Math.abs(there.top - line) > here.height / 2) break;
    line ??= there.top;
    const distance = Math.abs(there.left - here.left);
    if (best === null || distance < best.distance) best = { next, distance };
  }
  return best?.next ?? null;
}

/** The conversation survives a reload of its tab: it is kept in sessionStorage, and nowhere else. */

const PLACE = "fusionroute.conversation";

/**
 * A turn: the prompt, how the answer was asked for, what has come of it, and how it ended.
 * @typedef {{prompt: string, path: string, body: object, rule: string, seed: number, tokens: object[], tail?: string,
 *   lastId?: string, ending?: string, statistics?: object, tokensPerSecond?: number}} Turn
 */

/** @returns {Turn[]} */
export function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(PLACE) ?? "[]");
  } catch {
    return [];
  }
}

/**
 * Keeps the turns. Where there is not enough room, the oldest answers lose the candidates of their tokens first, then
 * the oldest turns go.
 * @param {Turn[]} turns
 */
export function keep(turns) {
  let left = turns;
  for (let numPlain = 0; ; ) {
    const kept = left.map((turn, index) => (index < numPlain ? withoutCandidates(turn) : turn));
    try {
      sessionStorage.setItem(PLACE, JSON.stringify(kept));
      return;
    } catch (error) {
      if (error.name !== "QuotaExceededError" || !left.length) throw error;
    }
    if (numPlain < left.length) numPlain += 1;
    else {
      left = left.slice(1);
      numPlain = left.length;
    }
  }
}

function withoutCandidates(turn) {
  return { ...turn, tokens: turn.tokens.map(({ top, weights, ...rest }) => rest) };
}

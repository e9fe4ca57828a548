/** What a token says about itself, in words. Tokens are as the API's extension gives them. */

import { percent, visible } from "./looks.js";

const BLENDING_RULES = new Set(["sum", "gated_sum", "mixture", "select"]);

/** The expert's own first choice; null where it is not known or no expert took part. */
export function expertsChoice(token) {
  return token.expert === null ? null : (token.top?.expert?.[0] ?? null);
}

/** Whether the token is another one than the expert would have written by itself. */
export function differs(token) {
  const choice = expertsChoice(token);
  return choice !== null && choice.id !== token.id;
}

/** Why the token is another one; "" where it is not. */
export function whyItDiffers(token, rule) {
  if (!differs(token)) return "";
  const own = `“${visible(expertsChoice(token).text)}”`;
  const best = token.top.fused?.[0];
  if (!BLENDING_RULES.has(rule)) return `The expert's first choice was ${own}; this one was sampled.`;
  if (best && best.id !== expertsChoice(token).id) {
    const sampled = best.id === token.id ? "" : " and then one further down was sampled";
    return `The complement overruled the expert, whose first choice was ${own}${sampled}.`;
  }
  return `The expert's first choice ${own} stayed the best of the sum; this one was sampled.`;
}

/** A token's name for those who do not see colours or dots. */
export function accessibleName(token, look) {
  const parts = [visible(token.text), `${look.name} (${look.letter})`];
  if (differs(token)) parts.push("not the expert's own choice");
  if (token.degraded) parts.push("its expert was not there");
  if (typeof token.logprob === "number") parts.push(percent(Math.exp(token.logprob)));
  return parts.join(", ");
}

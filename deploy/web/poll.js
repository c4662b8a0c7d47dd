/** Asking again and again, while somebody looks. */

import { Refused, ask } from "./api.js";
import { problem } from "./dom.js";

/**
 * A view's `visible` function that asks for `path` every `everyMs` while the view is seen.
 * @param {string} path
 * @param {number} everyMs
 * @param {string} problemId where a refusal is told; without a key it is not asked again
 * @param {(answer: object) => void} render
 */
export function poller(path, everyMs, problemId, render) {
  let round = 0; // of being seen: who finds another number has been overtaken
  async function poll(mine) {
    try {
      const answer = await ask(path);
      if (mine !== round) return;
      problem(problemId);
      render(answer);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (mine !== round) return;
      problem(problemId, error.message);
      if (error.status === 401) return;
    }
    setTimeout(() => mine === round && poll(mine), everyMs);
  }
  return (seen) => {
    round += 1;
    if (seen) poll(round);
  };
}

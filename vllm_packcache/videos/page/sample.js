// A map for who has made nothing yet: what is past is kept in less and less of its blocks.

import { CONDITION, DROPPED, drawMap, NOT_YET } from "./map.js";

const FRAMES = 12;
const BLOCKS = 8; // Of a frame, and of the condition.
const WINDOW = 6;
const TOKENS = 32;

const kept = (distance) => (distance > WINDOW ? 0 : Math.max(1, BLOCKS >> Math.max(0, distance - 1)));

function row(made) {
  const blocks = [[CONDITION, BLOCKS]];
  for (let frame = 0; frame <= made; frame++) {
    const distance = made - frame;
    const living = kept(distance);
    for (let block = 0; block < BLOCKS; block++) {
      // As far apart as they can be.
      const lives = Math.floor(((block + 1) * living) / BLOCKS) > Math.floor((block * living) / BLOCKS);
      blocks.push([lives ? distance : DROPPED, 1]);
    }
  }
  blocks.push([NOT_YET, BLOCKS * (FRAMES - 1 - made)]);
  const resident = blocks.reduce((sum, [state, count]) => sum + (state >= CONDITION ? count : 0), 0);
  return { label: made, blocks, resident: resident * TOKENS, full: (made + 2) * BLOCKS * TOKENS };
}

export function drawSample(canvas) {
  const rows = Array.from({ length: FRAMES }, (_, made) => row(made));
  const blocks = BLOCKS * (FRAMES + 1);
  drawMap(canvas, rows, { frames: FRAMES, blocks, full: blocks * TOKENS, selected: null });
}

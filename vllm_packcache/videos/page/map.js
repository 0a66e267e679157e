// The map of blocks: a row a frame, a column a block, and beside it the tokens that are resident, of all there were.

export const NOT_YET = -3;
export const DROPPED = -2;
export const CONDITION = -1;
const OLDEST_SHADE = 5; // Frames at this distance or more share a colour.

const GUTTER = 30; // Pixels for the numbers of frames,
const HEAD = 20; // and above the map for the names of what the blocks hold.
const GAP = 16;
const PERCENT = 40; // For the percentages behind the bars.
const HEIGHT = 330; // Of all rows together, where they have room for it;
const LOW = 280; // on a map that is not wide.
const WIDE = 560;
const LARGEST_ROW = 20;
const LABELLED = 13; // Pixels that a row must have for a number of its own.
const OUTLINED = 6; // Pixels that a block must have to be told from its neighbours.

const NAMES = { [NOT_YET]: "nothing yet", [DROPPED]: "dropped", [CONDITION]: "condition", 0: "frame being made", 1: "previous frame" };
export const nameOf = (state) => NAMES[state] ?? `${state} frames back`;

function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const rgb = (name) => [1, 3, 5].map((at) => parseInt(colour(name).slice(at, at + 2), 16));
  const back = [1, 2, 3, 4, 5].map((distance) => rgb(`back${distance}`));
  return {
    colour,
    of: (state) => {
      if (state === DROPPED) return rgb("dropped");
      if (state === CONDITION) return rgb("condition");
      return state === 0 ? rgb("made") : back[Math.min(state, OLDEST_SHADE) - 1];
    },
  };
}

export const blocksOf = (runs) => runs.reduce((sum, [, count]) => sum + count, 0);

export function stateAt(runs, block) {
  for (const [state, count] of runs) {
    if (block < count) return state;
    block -= count;
  }
  return NOT_YET;
}

// Where the frame that is being made begins.
function firstMade(runs) {
  let block = 0;
  for (const [state, count] of runs) {
    if (state === 0) return block;
    block += count;
  }
  return null;
}

// The mean colour of the blocks behind each of `width` pixels: a thinned frame looks paler.
function pixels(runs, blocks, width, colours) {
  const sums = new Float32Array(4 * width);
  let start = 0;
  for (const [state, count] of runs) {
    const [left, right] = [(start * width) / blocks, ((start + count) * width) / blocks];
    start += count;
    if (state === NOT_YET) continue;
    const [red, green, blue] = colours.of(state);
    for (let x = Math.floor(left); x < Math.min(Math.ceil(right), width); x++) {
      const share = Math.min(right, x + 1) - Math.max(left, x);
      sums[4 * x] += share * red;
      sums[4 * x + 1] += share * green;
      sums[4 * x + 2] += share * blue;
      sums[4 * x + 3] += share;
    }
  }
  const image = new ImageData(width, 1);
  for (let x = 0; x < width; x++) {
    const share = sums[4 * x + 3];
    if (share === 0) continue;
    for (let channel = 0; channel < 3; channel++) image.data[4 * x + channel] = sums[4 * x + channel] / share;
    image.data[4 * x + 3] = 255 * Math.min(share, 1);
  }
  return image;
}

// Draws the rows and returns which row and block a place on the canvas is of.
//   rows: {label, blocks: runs of [state, count], resident, full}; of the whole video there will be `frames`.
//   blocks, full: of the whole video with nothing dropped.
//   selected: index of a row, or null.
export function drawMap(canvas, rows, { frames, blocks, full, selected }) {
  const scale = devicePixelRatio || 1;
  const wide = canvas.clientWidth;
  const room = (wide < WIDE ? LOW : HEIGHT) / frames;
  const pitch = room < 1 ? room : Math.min(Math.floor(room), LARGEST_ROW);
  const high = Math.ceil(HEAD + pitch * frames + 2);
  const bars = Math.max(70, Math.round(wide * 0.2));
  const map = wide - GUTTER - GAP - bars;
  if (map < 20) return () => null;
  const [width, height] = [Math.round(wide * scale), Math.round(high * scale)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.style.height = `${high}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, wide, high);
  const colours = palette();
  const gap = pitch >= 4 ? 1.5 : 0;
  const bottom = HEAD + pitch * rows.length;

  // Room that is not used yet.
  context.fillStyle = colours.colour("hollow");
  context.fillRect(GUTTER, HEAD, map, pitch * frames);

  const strip = document.createElement("canvas");
  Object.assign(strip, { width: Math.round(map * scale), height: 1 });
  context.imageSmoothingEnabled = false;
  rows.forEach((row, index) => {
    strip.getContext("2d").putImageData(pixels(row.blocks, blocks, strip.width, colours), 0, 0);
    context.drawImage(strip, GUTTER, HEAD + index * pitch, map, Math.max(pitch - gap, 0.5));
  });

  context.lineWidth = 1;
  if (map / blocks >= OUTLINED) {
    context.strokeStyle = colours.colour("card");
    context.beginPath();
    for (let block = 1; block < blocks; block++) {
      const x = GUTTER + (block * map) / blocks;
      context.moveTo(x, HEAD);
      context.lineTo(x, HEAD + pitch * rows.length);
    }
    context.stroke();
  }

  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const starts = rows.map((row) => firstMade(row.blocks));
  const lined = pitch >= 4;
  let free = 0;
  const head = (name, first, past) => {
    const middle = GUTTER + ((first + past) / 2) * (map / blocks);
    const half = context.measureText(name).width / 2;
    const x = Math.max(middle, GUTTER + half);
    if (x - half < free || x + half > GUTTER + map + GAP) return;
    context.fillText(name, x, HEAD / 2 - 1);
    free = x + half + 14;
  };
  context.fillStyle = colours.colour("faint");
  context.textAlign = "center";
  if (starts[0]) head("condition", 0, starts[0]);
  starts.forEach((start, index) => {
    if (start === null) return;
    const past = starts[index + 1] ?? start + (starts[index] - (starts[index - 1] ?? 0));
    head(`frame ${rows[index].label}`, start, index + 1 < starts.length ? past : Math.min(past, blocks));
    if (!lined) return;
    context.globalAlpha = 0.3;
    context.fillRect(GUTTER + (start * map) / blocks - 0.25, HEAD, 0.5, bottom - HEAD);
    context.globalAlpha = 1;
  });

  context.textAlign = "right";
  const step = Math.max(1, Math.ceil(LABELLED / pitch));
  for (let index = 0; index < frames; index += step) {
    if (index >= rows.length) break;
    context.fillText(rows[index].label, GUTTER - 7, HEAD + index * pitch + (pitch - gap) / 2 + 0.5);
  }

  context.textAlign = "left";
  const left = GUTTER + map + GAP;
  rows.forEach((row, index) => {
    const y = HEAD + index * pitch;
    const tall = Math.max(pitch - gap, 0.5);
    const [all, held] = [row.full, row.resident].map((tokens) => (tokens / full) * (bars - PERCENT));
    context.fillStyle = colours.colour("dropped");
    context.fillRect(left, y, all, tall);
    context.fillStyle = colours.colour("resident");
    context.fillRect(left, y, held, tall);
    if (index % step !== 0) return;
    context.fillStyle = colours.colour("faint");
    context.fillText(`${Math.round((100 * row.resident) / row.full)} %`, left + all + 5, y + tall / 2 + 0.5);
  });
  context.fillStyle = colours.colour("faint");
  context.fillText("tokens", left, HEAD / 2 - 1);

  if (selected !== null && selected < rows.length) {
    context.strokeStyle = colours.colour("ink");
    context.lineWidth = 1.5;
    context.strokeRect(GUTTER - 1.5, HEAD + selected * pitch - 1.5, map + 3, Math.max(pitch - gap, 1) + 3);
  }

  return (x, y) => {
    const row = Math.floor((y - HEAD) / pitch);
    if (row < 0 || row >= rows.length) return null;
    const block = Math.floor(((x - GUTTER) * blocks) / map);
    return { row, block: block >= 0 && block < blocks ? block : null };
  };
}

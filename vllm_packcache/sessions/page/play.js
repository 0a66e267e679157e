// A world is played: what is pressed goes to the server, a frame comes back, one at a time.

const BACK = 10;
const RECENT = 8; // Frames that the time of one is the mean of.
const SPOKEN = 10_000; // Milliseconds between two readings of the line to who cannot see it.
const AGAIN = 400; // Milliseconds after which a session that is busy is asked again.
const OPENING = -1; // As a frame to go back to.

const at = (id) => document.getElementById(id);
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

class Refused extends Error {
  constructor(status, message, after) {
    super(message);
    Object.assign(this, { status, after });
  }
}

let secret = null; // Never stored: a page that is loaded again asks again.
let world = null;
let game = null; // The session that is played, and what is known of it.
let paused = false;
const keys = new Map(); // Controls by the keys that press them.
const down = new Map(); // Controls that are pressed, the newest last, each with what presses it.
const tapped = new Set(); // Controls that were pressed since the last frame was asked for.

// ------------------------------------------------------------------------------------------------ the server

async function ask(method, path, body, more = {}) {
  let answer;
  try {
    answer = await fetch(new URL(`v1/${path}`, document.baseURI), {
      method,
      headers: {
        ...(secret !== null && { Authorization: `Bearer ${secret}` }),
        ...(body !== undefined && { "Content-Type": "application/json" }),
      },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      ...more,
    });
  } catch {
    throw new Refused(0, "The server does not answer: see whether it still runs.");
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const said = await answer.json().catch(() => null);
  const message = said?.error?.message ?? `The server answers ${answer.status}.`;
  throw new Refused(answer.status, message, answer.headers.get("Retry-After"));
}

const forget = (name) => ask("DELETE", `sessions/${name}`, undefined, { keepalive: true }).catch(() => {});

// ------------------------------------------------------------------------------------------------ what is seen

function say(text, wrong = false) {
  at("message").textContent = text;
  at("message").classList.toggle("wrong", wrong);
}

function fail(error) {
  if (!(error instanceof Refused)) {
    say(`Something of this page is broken: ${error.message}`, true);
    throw error;
  }
  if (error.status === 401) askForKey();
  else if (error.status === 503 && error.after) say(`The server is full: try again in ${error.after} s.`, true);
  else say(error.message, true);
}

function askForKey() {
  say(secret === null ? "" : "That is not the key.", true);
  secret = null;
  at("game").hidden = true;
  at("key").hidden = false;
  at("secret").value = "";
  at("secret").focus();
}

async function draw(frame) {
  if (frame.picture === undefined) throw new Refused(0, "The server draws no pictures: its frames have no grid.");
  const bytes = Uint8Array.from(atob(frame.picture), (character) => character.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = at("picture");
  if (canvas.width !== picture.width || canvas.height !== picture.height) {
    Object.assign(canvas, { width: picture.width, height: picture.height });
    document.documentElement.style.setProperty("--ratio", picture.width / picture.height);
  }
  canvas.getContext("2d").drawImage(picture, 0, 0);
  picture.close();
}

function tell(frame) {
  game.seconds = [...game.seconds, frame.seconds].slice(-RECENT);
  const mean = game.seconds.reduce((sum, own) => sum + own, 0) / game.seconds.length;
  const number = (value) => value.toLocaleString("en");
  at("line").textContent = [
    `frame ${number(frame.frame)}`,
    `${number(frame.resident_tokens)} tokens resident of ${number(frame.logical_tokens)} in all`,
    `${mean.toFixed(mean < 0.1 ? 3 : 2)} s a frame`,
  ].join(" · ");
  if (performance.now() - game.spoken > SPOKEN) {
    game.spoken = performance.now();
    at("spoken").textContent = at("line").textContent;
  }
}

function enable() {
  at("new").disabled = game !== null && !game.begun;
  at("pause").disabled = game === null || !game.begun;
  at("back").disabled = game === null || !game.begun || game.next === 0;
  at("pause").setAttribute("aria-pressed", paused);
  at("pause").textContent = paused ? "Go on" : "Pause";
}

// ------------------------------------------------------------------------------------------------ a game

let awaken = () => {};

function wake() {
  awaken();
}

// A paused game makes a frame for each key.
const resting = () => document.hidden || (paused && tapped.size === 0);

function action() {
  const parts = [...down.keys(), ...tapped].filter((control) => !control.once || tapped.has(control));
  tapped.clear();
  return Object.assign({}, world.idle, ...parts.map((control) => control.action));
}

async function step(own) {
  const body = own.given ? { action: action() } : {};
  const frame = await ask("POST", `sessions/${own.name}/steps`, body);
  if (game !== own) return;
  own.given = world.actions;
  own.next = frame.frame + 1;
  await draw(frame);
  tell(frame);
  say("");
}

async function goBack(own) {
  own.back = false;
  const frame = own.next - 1 - BACK;
  const shown = await ask("POST", `sessions/${own.name}/reset`, { frame: frame < 0 ? OPENING : frame });
  Object.assign(own, { given: shown.given_ids > 0, next: shown.next_frame });
  await step(own); // So that it is seen.
}

async function play(own) {
  while (game === own) {
    if (resting() && !own.back) {
      await new Promise((done) => (awaken = done));
      continue;
    }
    const began = performance.now();
    try {
      await (own.back ? goBack(own) : step(own));
    } catch (error) {
      if (game !== own) return;
      if (error instanceof Refused && error.status === 409) {
        await wait(AGAIN);
        continue;
      }
      // Of an ended session nothing is left, and any other may be gone on with.
      if (error.status === 404 || error.status === 401) game = null;
      paused = game !== null;
      fail(error);
      if (game === null && error.status === 404) {
        say("This game has ended: begin a new one.", true);
        at("new").focus();
      }
    }
    enable();
    await wait(Math.max(0, 1000 / world.frames_per_second - (performance.now() - began)));
  }
}

async function begin() {
  const before = game;
  const own = { name: null, begun: false, next: 0, given: false, back: false, seconds: [], spoken: performance.now() };
  game = own;
  paused = false;
  tapped.clear();
  enable();
  wake();
  if (before?.name) await forget(before.name);
  at("line").textContent = "\u00a0"; // Of no other game.
  say("The first frame is being made.");
  try {
    const shown = await ask("POST", "sessions", world.openings[at("openings").value].session);
    if (game !== own) forget(shown.id); // The page was left meanwhile.
    Object.assign(own, { name: shown.id, begun: true, next: shown.next_frame, given: shown.given_ids > 0 });
  } catch (error) {
    game = null;
    fail(error);
  }
  enable();
  if (game === own) await play(own);
}

function leave() {
  if (game?.name) forget(game.name);
  game = null;
  wake();
}

// ------------------------------------------------------------------------------------------------ what is pressed

const NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Space: "space" };
const keyName = (code) => NAMES[code] ?? code.replace(/^(Key|Digit)/, "");

function press(control, by) {
  if (!down.has(control)) down.set(control, new Set());
  down.get(control).add(by);
  tapped.delete(control); // The newest comes last.
  tapped.add(control);
  control.button.classList.add("down");
  wake();
}

function release(control, by) {
  const held = down.get(control);
  if (!held?.delete(by) || held.size > 0) return;
  down.delete(control);
  control.button.classList.remove("down");
}

function releaseAll() {
  for (const [control, held] of down) for (const by of [...held]) release(control, by);
}

function buttonOf(control) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(control.label);
  if (control.keys.length > 0) {
    const key = document.createElement("kbd");
    key.textContent = keyName(control.keys[0]);
    button.append(key);
    button.title = `Keys: ${control.keys.map(keyName).join(", ")}`;
  }
  button.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    button.setPointerCapture(event.pointerId);
    press(control, event.pointerId);
  });
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
    button.addEventListener(name, (event) => release(control, event.pointerId));
  }
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  // By the keyboard, or by what reads the page aloud: no pointer.
  button.addEventListener("click", (event) => {
    if (event.detail !== 0) return;
    press(control, "click");
    release(control, "click");
  });
  return button;
}

// What has a use for keys of its own keeps them.
const taken = (event) =>
  event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.("input, select") ||
  (event.target.closest?.("button") && ["Space", "Enter"].includes(event.code));

addEventListener("keydown", (event) => {
  const control = keys.get(event.code);
  if (!control || taken(event) || game === null) return;
  event.preventDefault();
  if (!event.repeat) press(control, event.code);
});
addEventListener("keyup", (event) => keys.has(event.code) && release(keys.get(event.code), event.code));
addEventListener("blur", releaseAll);

// ------------------------------------------------------------------------------------------------ the page

async function open() {
  try {
    world = await ask("GET", "play");
  } catch (error) {
    fail(error);
    return;
  }
  document.title = at("title").textContent = world.title;
  at("hint").textContent = world.hint ?? "";
  keys.clear();
  for (const control of world.controls) {
    control.button = buttonOf(control);
    for (const code of control.keys) keys.set(code, control);
  }
  at("controls").replaceChildren(...world.controls.map((control) => control.button));
  at("openings").replaceChildren(...world.openings.map((opening, number) => new Option(opening.name, number)));
  at("openings").hidden = world.openings.length < 2;
  at("key").hidden = true;
  at("game").hidden = false;
  await begin();
}

at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  secret = at("secret").value;
  open();
});
// A button that was clicked must not be pressed again by a key of the game.
for (const id of ["new", "back", "pause"]) {
  at(id).addEventListener("click", (event) => event.detail !== 0 && at(id).blur());
}
at("new").addEventListener("click", begin);
at("back").addEventListener("click", () => {
  game.back = true;
  wake();
});
at("pause").addEventListener("click", () => {
  paused = !paused;
  enable();
  wake();
});
document.addEventListener("visibilitychange", () => {
  releaseAll();
  wake();
});
addEventListener("pagehide", leave);
addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  say("This game has ended: begin a new one.");
  enable();
});

open();

// The page: the form, the stage with one video or two, and the list of all of them.

import { ask, askJson, hasKey, Refused, useKey } from "./api.js";
import { Card, comparison } from "./card.js";
import { openForm } from "./form.js";
import { forget, highlight, openList, refresh, remember, withMemory } from "./list.js";
import { drawSample } from "./sample.js";
import { answered, at, decimal, memoryOf, whole } from "./tools.js";

const MOST = 2; // Videos side by side.
const SPOKEN = 10_000; // Milliseconds between two readings of what happens to who cannot see it.

let about = null;
let cards = [];
let index = null; // Of the frame that is shown; null: the newest one of each.
let playing = null; // Timer of the next frame.
let drawing = false;
let spoken = -SPOKEN;
const still = matchMedia("(prefers-reduced-motion: reduce)");

// ------------------------------------------------------------------------------------------------ words

function say(text, wrong = false) {
  at("message").textContent = text;
  at("message").classList.toggle("wrong", wrong);
}

function speak(text, now = false) {
  if (!now && performance.now() - spoken < SPOKEN) return;
  spoken = performance.now();
  at("spoken").textContent = text;
}

function failed(error) {
  if (!(error instanceof Refused)) {
    say(`Something of this page is broken: ${error.message}`, true);
    throw error;
  }
  if (error.status === 401) askForKey();
  else say(error.status === 503 && error.after ? `The server is full: try again in ${error.after} s.` : error.message, true);
}

function askForKey() {
  say(hasKey() ? "That is not the key." : "", true);
  useKey(null);
  at("work").hidden = true;
  at("key").hidden = false;
  at("secret").value = "";
  at("secret").focus();
}

// ------------------------------------------------------------------------------------------------ the stage

const newest = () => Math.max(0, ...cards.map((card) => card.frames.length - 1));

function draw() {
  drawing = false;
  if (cards.length === 0) drawSample(at("sample"));
  const last = newest();
  const sizes = cards.map((card) => card.size());
  // Two maps are as large as each other, so that they can be compared.
  const size = Object.fromEntries(["frames", "full", "blocks"].map((name) => [name, Math.max(1, ...sizes.map((own) => own[name]))]));
  const shown = index === null ? last : Math.min(index, last);
  for (const card of cards) card.show(shown, size).catch((error) => say(`A frame cannot be shown: ${error.message}`, true));
  at("transport").hidden = !cards.some((card) => card.frames.length > 0);
  Object.assign(at("at"), { max: last, value: shown });
  const frame = (cards.find((card) => card.shown) ?? {}).shown;
  const fps = cards[0]?.video.fps ?? about?.tokenizer.fps;
  const time = frame && fps ? ` · ${decimal((shown * (frame.pictures || 1)) / fps)} s` : "";
  const words = frame ? `${frame.given ? "given " : ""}frame ${whole(frame.frame)}` : "";
  at("where").textContent = words + time;
  at("at").setAttribute("aria-valuetext", words);
  at("play").textContent = playing === null ? "Play" : "Pause";
  at("newest").setAttribute("aria-pressed", index === null);
  compare();
}

function compare() {
  const words = cards.length === 2 ? comparison(...cards) : "";
  at("compared").textContent = words || "\u00a0";
  at("compared").hidden = cards.length < 2;
}

function later() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(draw);
}

function halt() {
  clearTimeout(playing);
  playing = null;
}

function pick(place) {
  halt();
  index = place;
  later();
}

// Frame after frame, in the time that a frame is seen in the video.
function play(from) {
  halt();
  index = from;
  const step = () => {
    const frame = cards.find((card) => card.frames.length > index)?.frames[index];
    const fps = cards[0]?.video.fps ?? about.tokenizer.fps ?? 4;
    playing = setTimeout(() => {
      if (index < newest()) {
        index++;
        step();
      } else {
        halt();
        if (cards.some((card) => !card.ended)) index = null;
      }
      later();
    }, (1000 * Math.max(1, frame?.pictures ?? 1)) / fps);
  };
  step();
  later();
}

function arrange() {
  at("empty").hidden = cards.length > 0;
  at("cards").classList.toggle("two", cards.length === 2);
  highlight(cards.map((card) => card.id));
  const hash = cards.map((card) => encodeURIComponent(card.id)).join(",");
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  compare();
  later();
}

function add(video) {
  const card = new Card(withMemory(video), stage);
  cards.push(card);
  at("cards").append(card.root);
}

function removeCard(card) {
  card.leave();
  cards = cards.filter((own) => own !== card);
}

function reveal() {
  const { top } = at("stage").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 3) at("stage").scrollIntoView({ behavior: still.matches ? "auto" : "smooth" });
}

const stage = {
  failed,

  changed(card, kind) {
    later();
    if (kind === "frame" || kind === "status") speak(`${card.name}: ${card.part(".state p").textContent}`);
    if (!card.ended || kind === undefined) return;
    speak(`${card.name}: ${card.part(".state p").textContent}`, true);
    refresh().catch(failed);
    // What was watched as it was made is played once it is whole.
    const live = index === null && card.frames.length > 1 && card.watched;
    if (live && cards.every((own) => own.ended) && !still.matches) play(0);
  },

  painted: compare,
  pick,

  open(videos) {
    halt();
    index = null;
    const ids = videos.map((video) => video.id);
    for (const card of [...cards]) if (!ids.includes(card.id)) removeCard(card);
    for (const video of videos) if (!cards.some((card) => card.id === video.id)) add(video);
    arrange();
  },

  choose(video) {
    stage.open([video]);
    reveal();
  },

  beside(video) {
    if (cards.length === MOST) removeCard(cards[MOST - 1]);
    add(video);
    arrange();
  },

  close(card) {
    halt();
    removeCard(card);
    arrange();
    at("stage").focus({ preventScroll: true });
  },

  async remove(video) {
    const done = ["completed", "failed"].includes(video.status);
    at("sure-title").textContent = "Delete this video?";
    if (done && (await answered(at("sure"))) !== "yes") return;
    try {
      await ask("DELETE", `videos/${encodeURIComponent(video.id)}`);
    } catch (error) {
      if (error.status !== 404) {
        failed(error);
        return;
      }
    }
    forget(video.id);
    const card = cards.find((own) => own.id === video.id);
    if (card && done) stage.close(card);
    else card?.end("stopped");
  },

  stop(card) {
    return stage.remove({ id: card.id, status: card.status });
  },

  async extend(card) {
    at("added").value = Math.max(1, Math.round((about.tokenizer.frames ?? 8) / 2));
    at("extension-prompt").value = card.video.prompt ?? "";
    if ((await answered(at("extension"))) !== "extend") return;
    try {
      const video = await askJson("POST", "videos/extensions", {
        video: { id: card.id },
        prompt: at("extension-prompt").value,
        num_frames: Number(at("added").value),
      });
      await made([{ ...video, options: video.options ?? card.video.options }]);
    } catch (error) {
      failed(error);
    }
  },
};

async function made(videos) {
  say("");
  videos.forEach(remember);
  stage.open(videos);
  reveal();
  for (const card of cards) card.watched = true;
  await refresh();
}

// ------------------------------------------------------------------------------------------------ the page

const linked = () => location.hash.slice(1).split(",").filter(Boolean).map(decodeURIComponent).slice(0, MOST);

async function restore(listed) {
  const videos = [];
  for (const id of linked()) {
    try {
      videos.push(withMemory(await ask("GET", `videos/${encodeURIComponent(id)}`)));
    } catch (error) {
      if (error.status !== 404) throw error;
    }
  }
  const shown = videos.length > 0 ? videos : listed.filter((video) => video.status !== "failed").slice(0, 1);
  if (shown.length > 0) stage.open(shown);
  else arrange();
}

async function open() {
  try {
    about = await ask("GET", "playground");
    at("key").hidden = true;
    at("work").hidden = false;
    say("");
    const { policy, options } = memoryOf({ options: { policy: about.policy, ...about.options } });
    at("server").textContent = [about.model, policy].filter(Boolean).join(" · ");
    at("server").title = options;
    await openForm(about, made, failed);
    await restore(await openList(stage));
  } catch (error) {
    failed(error);
  }
}

at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("secret").value);
  open();
});
at("play").addEventListener("click", () => {
  if (playing !== null) {
    halt();
    later();
  } else play(index === null || index >= newest() ? 0 : index);
});
at("at").addEventListener("input", () => pick(Number(at("at").value)));
at("newest").addEventListener("click", () => {
  halt();
  index = null;
  later();
});
addEventListener("resize", later);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});

open();

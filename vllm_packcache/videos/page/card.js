// One video: its frames as they come, the map of its blocks, its numbers.

import { fetchBlob, follow } from "./api.js";
import { blocksOf, drawMap, nameOf, stateAt } from "./map.js";
import { at, decimal, memoryOf, option, save, seconds, whole } from "./tools.js";

const RECENT = 5; // Frames whose time says how long the rest takes.
const ENDED = new Set(["completed", "failed", "stopped", "gone"]);

export class Card {
  // `stage` is told by changed(card) that there is more to see, by failed(error) what went wrong, and by
  // pick(index), extend, stop and close what a person wants.
  constructor(video, stage) {
    this.video = video;
    this.stage = stage;
    this.frames = []; // Of the events, given ones included.
    this.status = video.status;
    this.lost = false;
    this.drawn = null; // Index of the frame whose picture is on the canvas.
    this.leaving = new AbortController();
    this.root = at("card").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.part(".extend").addEventListener("click", () => stage.extend(this));
    this.part(".stop").addEventListener("click", () => stage.stop(this));
    this.part(".close").addEventListener("click", () => stage.close(this));
    this.part(".watch").addEventListener("click", () => this.watch());
    for (const button of this.root.querySelectorAll("[data-variant]")) {
      button.addEventListener("click", () => this.download(button.dataset.variant));
    }
    // How alike two pictures are is read from their canvases.
    this.picture = this.part(".picture").getContext("2d", { willReadFrequently: true });
    this.part(".stream").addEventListener("change", () => stage.changed(this));
    const map = this.part(".map");
    map.addEventListener("pointermove", (event) => this.point(event));
    map.addEventListener("pointerleave", () => this.caption());
    map.addEventListener("click", (event) => this.point(event, true));
    this.resized = new ResizeObserver(() => stage.changed(this));
    this.resized.observe(map);
    this.describe();
    this.run().catch((error) => stage.failed(error));
  }

  get id() {
    return this.video.id;
  }

  get ended() {
    return ENDED.has(this.status);
  }

  // Of the frames that are known by their blocks; of guided videos those of one stream.
  get rows() {
    return this.frames.filter((frame) => frame.blocks).map((frame) => this.streamed(frame));
  }

  streamed(frame) {
    const own = frame?.streams?.[this.part(".stream").value];
    return own ? { ...frame, ...(Array.isArray(own) ? { blocks: own } : own), index: frame.index } : frame;
  }

  get name() {
    return memoryOf(this.video).policy ?? this.video.id;
  }

  leave() {
    this.leaving.abort();
    this.resized.disconnect();
    this.root.remove();
  }

  async run() {
    const connected = (now) => {
      this.lost = !now;
      this.describe();
    };
    try {
      for await (const { kind, data } of follow(this.id, this.leaving.signal, connected)) this.hear(kind, data);
    } catch (error) {
      if (error.status !== 404) throw error;
      if (!this.ended) this.end("gone");
    }
  }

  hear(kind, data) {
    if (kind === "frame") {
      this.frames.push({ ...data, index: this.frames.length });
      if (!this.ended) this.status = "in_progress";
      const stream = this.part(".stream");
      if (data.streams && stream.hidden) {
        stream.replaceChildren(...Object.keys(data.streams).map((name) => option(name, name)));
        stream.hidden = false;
      }
    } else if (kind === "status" || kind === "completed" || kind === "failed") {
      // A page that made the video knows more than a server may tell.
      this.video = { ...this.video, ...data, options: data.options ?? this.video.options };
      // A finished video that is opened is told of from its beginning.
      if (kind !== "status") this.status = kind;
      else if (!this.ended) this.status = data.status;
    }
    this.describe();
    this.stage.changed(this, kind);
  }

  end(status) {
    this.leaving.abort();
    this.status = status;
    this.describe();
    this.stage.changed(this, status);
  }

  // ---------------------------------------------------------------------------------------------- words

  describe() {
    const memory = memoryOf(this.video);
    this.part("h3").textContent = memory.policy ?? "Video";
    this.part(".settings").textContent = memory.options;
    this.part(".prompt").textContent = this.part(".prompt").title = this.video.prompt ?? "";
    this.part(".state p").textContent = this.words();
    this.root.dataset.status = this.status;
    const progress = this.part("progress");
    progress.hidden = this.ended;
    const made = this.frames.filter((frame) => !frame.given).length;
    progress.value = this.frames.at(-1)?.progress ?? (made ? progress.value : this.video.progress ?? 0);
    const completed = this.status === "completed";
    const pictures = this.frames.some((frame) => frame.picture);
    this.part(".watch").hidden = !completed || !pictures;
    this.part(".download").hidden = !completed;
    for (const variant of ["video", "spritesheet"]) this.part(`[data-variant=${variant}]`).hidden = !pictures;
    this.part(".extend").hidden = !completed;
    this.part(".stop").hidden = this.status === "stopped" || this.status === "gone";
    this.part(".stop").textContent = this.ended ? "Delete" : "Stop";
    this.part(".blank").hidden = pictures || this.rows.length === 0;
    this.part(".picture").hidden = !this.part(".blank").hidden;
  }

  words() {
    const own = this.frames.filter((frame) => !frame.given);
    const last = own.at(-1);
    const total = last?.frames ?? this.video.frames;
    if (this.status === "completed") {
      const time = this.video.inference_time_s ?? own.reduce((sum, frame) => sum + (frame.seconds ?? 0), 0);
      return `${whole(own.length)} frames in ${seconds(time)}`;
    }
    if (this.status === "failed") return this.video.error?.message ?? "It failed.";
    if (this.status === "stopped") return `Stopped after ${whole(own.length)} frames`;
    if (this.status === "gone") return "This video was deleted.";
    if (this.lost) return "The connection is lost: trying again.";
    if (this.status === "queued") return "Waiting for its turn";
    if (!last) return "The first frame is being made";
    const recent = own.slice(-RECENT);
    const left = (recent.reduce((sum, frame) => sum + frame.seconds, 0) / recent.length) * (total - own.length);
    return `${whole(own.length)} of ${whole(total)} frames made${left >= 1 ? `, about ${seconds(left)} left` : ""}`;
  }

  // ---------------------------------------------------------------------------------------------- what is seen

  // Shows the frame of an index, of a map that is drawn as large as that of another video beside it.
  show(index, size) {
    const shown = Math.min(index, this.frames.length - 1);
    this.shown = shown < 0 ? null : this.streamed(this.frames[shown]);
    const rows = this.rows;
    const row = rows.findIndex((own) => own.index === shown);
    const drawn = rows.map((own) => ({
      label: own.frame,
      blocks: own.blocks,
      resident: own.resident_tokens,
      full: own.full_tokens,
    }));
    this.find = drawMap(this.part(".map"), drawn, { ...size, selected: row < 0 ? null : row });
    this.number();
    this.caption();
    return this.draw(shown);
  }

  // As many frames, blocks and tokens as the whole video will have.
  size() {
    const rows = this.rows;
    const last = rows.at(-1);
    const total = last?.frames ?? this.video.frames ?? 1;
    const first = rows[0]?.frame ?? 0;
    // Frames that were given may have no rows.
    const frames = Math.max(rows.length, total - (first < total ? first : 0), 1);
    const each = rows.length > 1 ? rows[1].full_tokens - rows[0].full_tokens : 0;
    const full = (last?.full_tokens ?? 1) + each * (frames - rows.length);
    const known = Math.max(1, ...rows.map((row) => blocksOf(row.blocks)));
    return { frames, full, blocks: Math.max(known, Math.ceil(full / (last?.block_size ?? 16))) };
  }

  async draw(index) {
    const picture = this.frames[index]?.picture;
    if (this.drawn === index || !picture) return;
    this.drawn = index;
    const image = new Image();
    image.src = picture;
    await image.decode();
    if (this.drawn !== index) return;
    const canvas = this.part(".picture");
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    this.picture.drawImage(image, 0, 0);
    canvas.classList.toggle("small", width <= 192);
    canvas.setAttribute("aria-label", `Frame ${this.frames[index].frame}: ${this.video.prompt ?? ""}`);
    this.stage.painted();
  }

  number() {
    const frame = this.shown;
    if (!frame?.full_tokens) return;
    this.part(".share dd").textContent = `${Math.round((100 * frame.resident_tokens) / frame.full_tokens)} %`;
    this.part(".tokens dd").textContent = `${whole(frame.resident_tokens)} of ${whole(frame.full_tokens)}`;
    this.part(".speed dd").textContent = frame.seconds === undefined || frame.given ? "–" : seconds(frame.seconds);
    this.part(".positions dd").textContent = frame.positions ? frame.positions.map(whole).join(" – ") : "–";
  }

  caption(words) {
    const frame = this.shown;
    const blocks = frame?.resident_blocks ?? 0;
    const usual = frame?.blocks
      ? `Memory while frame ${frame.frame} is made: ${whole(blocks)} blocks of ${frame.block_size} tokens`
      : "Memory: a row a frame, a column a block";
    this.part("figcaption span").textContent = words ?? usual;
    if (words === undefined && frame?.blocks) this.part(".map").setAttribute("aria-label", `Map of the blocks. ${usual}`);
  }

  point(event, picked = false) {
    const found = this.find?.(event.offsetX, event.offsetY);
    if (!found) return this.caption();
    const row = this.rows[found.row];
    if (picked) this.stage.pick(row.index);
    if (found.block === null) return this.caption();
    this.caption(`Frame ${row.frame}, block ${whole(found.block)}: ${nameOf(stateAt(row.blocks, found.block))}`);
  }

  // How far two pictures are apart, from 0 to 1; null: they cannot be compared.
  differs(other) {
    const [own, others] = [this, other].map((card) => card.part(".picture"));
    if (own.width !== others.width || own.height !== others.height) return null;
    if (this.drawn === null || this.drawn !== other.drawn) return null;
    const [left, right] = [this, other].map((card) => card.picture.getImageData(0, 0, own.width, own.height).data);
    let sum = 0;
    for (let place = 0; place < left.length; place++) sum += Math.abs(left[place] - right[place]);
    return sum / (255 * 3 * own.width * own.height);
  }

  // ---------------------------------------------------------------------------------------------- files

  async content(variant) {
    try {
      return await fetchBlob(`videos/${encodeURIComponent(this.id)}/content?variant=${variant}`);
    } catch (error) {
      this.stage.failed(error);
      return null;
    }
  }

  async watch() {
    const blob = await this.content("video");
    if (!blob) return;
    const [film, dialog] = [at("film"), at("player")];
    film.src = URL.createObjectURL(blob);
    film.classList.toggle("small", this.part(".picture").width <= 192);
    dialog.showModal();
    dialog.addEventListener("close", () => {
      URL.revokeObjectURL(film.src);
      film.removeAttribute("src");
      film.load();
    }, { once: true });
  }

  async download(variant) {
    this.part(".download").open = false;
    this.part(".download summary").focus();
    if (variant === "memory") {
      const frames = this.frames.map((frame) => ({ ...frame, index: undefined, picture: undefined }));
      save(new Blob([JSON.stringify({ ...this.video, events: frames }, null, 1)], { type: "application/json" }), `${this.id}.json`);
      return;
    }
    const blob = await this.content(variant);
    const suffix = { video: "mp4", spritesheet: "jpg", ids: "i4" }[variant];
    if (blob) save(blob, `${this.id}.${suffix}`);
  }
}

// What two videos say of each other at the frames that are shown.
export function comparison(left, right) {
  const [one, other] = [left.shown, right.shown];
  if (!one?.full_tokens || !other?.full_tokens || one.frame !== other.frame) return "";
  const names = left.name === right.name ? ["the first one", "the second one"] : [left.name, right.name];
  const [held, others] = [one.resident_tokens, other.resident_tokens];
  const [less, more] = held < others ? names : names.reverse();
  const share = decimal((100 * Math.min(held, others)) / Math.max(held, others));
  const parts = [
    held === others ? `both hold ${whole(held)} tokens` : `${less} holds ${share} % of the tokens that ${more} holds`,
  ];
  const apart = left.differs(right);
  if (apart !== null) parts.push(apart === 0 ? "the pictures are the same" : `the pictures differ by ${decimal(100 * apart)} %`);
  return `At frame ${one.frame} ${parts.join("; ")}.`;
}

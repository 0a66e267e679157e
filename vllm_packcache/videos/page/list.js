// All videos of the server, the newest first, a page at a time.

import { ask, fetchBlob } from "./api.js";
import { at, memoryOf } from "./tools.js";

const PAGE = 12;
const AGAIN = 4_000; // Milliseconds after which videos that are not finished are looked at again.

const items = new Map(); // By the video's id: {video, root, address of the thumbnail}.
let stage = null;
let shown = []; // Ids that are on the stage.
let timer = null;

const known = new Map(); // What this page knows of the videos it made, by id.
export const remember = (video) => known.set(video.id, video.options);
export const withMemory = (video) => ({ ...video, options: video.options ?? known.get(video.id) });

function words(video) {
  const memory = memoryOf(video);
  const states = { queued: "waiting", in_progress: `${video.progress ?? 0} %`, completed: "", failed: "failed" };
  const frames = video.frames ?? video.pictures;
  const length = frames ? `${frames} frames` : `${video.seconds} s`;
  return [memory.policy, memory.options, length, states[video.status] ?? video.status].filter(Boolean).join(" · ");
}

async function thumbnail(item) {
  item.asked = true;
  try {
    const blob = await fetchBlob(`videos/${encodeURIComponent(item.video.id)}/content?variant=thumbnail`);
    item.address = URL.createObjectURL(blob);
    const image = item.root.querySelector("img");
    image.src = item.address;
    image.hidden = false;
    item.root.querySelector(".thumb span").hidden = true;
  } catch {
    // A video without pictures has none, and it is seen without.
  }
}

function update(item, video) {
  item.video = video;
  const { root } = item;
  root.dataset.status = video.status;
  root.querySelector(".prompt").textContent = video.prompt || "no prompt";
  root.querySelector(".hint").textContent = words(video);
  root.querySelector(".thumb span").textContent =
    { queued: "…", in_progress: `${video.progress ?? 0} %`, failed: "!" }[video.status] ?? "";
  root.querySelector(".delete").textContent = ["completed", "failed"].includes(video.status) ? "Delete" : "Stop";
  if (video.status === "completed" && !item.asked) thumbnail(item);
}

function create(video) {
  const root = at("item").content.firstElementChild.cloneNode(true);
  const item = { video, root, address: null, asked: false };
  root.querySelector(".open").addEventListener("click", () => stage.choose(item.video));
  root.querySelector(".beside").addEventListener("click", () => stage.beside(item.video));
  root.querySelector(".delete").addEventListener("click", () => stage.remove(item.video));
  items.set(video.id, item);
  return item;
}

export function forget(id) {
  const item = items.get(id);
  if (!item) return;
  if (item.address) URL.revokeObjectURL(item.address);
  const next = item.root.nextElementSibling ?? item.root.previousElementSibling;
  if (item.root.contains(document.activeElement)) (next?.querySelector(".open") ?? at("videos-title")).focus();
  item.root.remove();
  items.delete(id);
  at("none").hidden = items.size > 0;
}

export function highlight(ids) {
  shown = ids;
  for (const [id, item] of items) {
    if (shown.includes(id)) item.root.querySelector(".open").setAttribute("aria-current", "true");
    else item.root.querySelector(".open").removeAttribute("aria-current");
    item.root.querySelector(".beside").hidden = shown.length === 0 || shown.includes(id);
  }
}

async function load(after) {
  const query = new URLSearchParams({ limit: PAGE, order: "desc", ...(after && { after }) });
  return ask("GET", `videos?${query}`);
}

function take(page, place) {
  for (const own of page.data) {
    const video = withMemory(own);
    const item = items.get(video.id) ?? create(video);
    update(item, video);
    if (!item.root.isConnected) place(item.root);
  }
  at("none").hidden = items.size > 0;
  highlight(shown);
}

// Looks at the newest ones; those that were asked for before stay.
export async function refresh() {
  clearTimeout(timer);
  const page = await load(null);
  let before = null;
  take(page, (root) => (before ? before.after(root) : at("list").prepend(root), (before = root)));
  const ids = new Set(page.data.map((video) => video.id));
  const listed = [...at("list").children];
  // What another client deleted is missing between the first and the last of the page.
  const last = listed.findIndex((root) => root === items.get(page.last_id)?.root);
  for (const [id, item] of [...items]) {
    const place = listed.indexOf(item.root);
    if (!ids.has(id) && (place < last || !page.has_more)) forget(id);
  }
  if (items.size <= PAGE) at("older").hidden = !page.has_more;
  const unfinished = [...items.values()].some(({ video }) => !["completed", "failed"].includes(video.status));
  if (unfinished) timer = setTimeout(() => (document.hidden ? later() : refresh().catch(later)), AGAIN);
  return page.data.map(withMemory);
}

function later() {
  timer = setTimeout(() => (document.hidden ? later() : refresh().catch(later)), AGAIN);
}

async function older() {
  const page = await load(lastId());
  const first = page.data[0]?.id;
  take(page, (root) => at("list").append(root));
  at("older").hidden = !page.has_more;
  items.get(first)?.root.querySelector(".open").focus();
}

const lastId = () => [...items.values()].find(({ root }) => root === at("list").lastElementChild)?.video.id;

export function openList(own) {
  stage = own;
  at("older").onclick = () => older().catch(stage.failed);
  return refresh();
}

// What is asked for: prompt, picture, size, frames, memory, and what else the server offers.

import { ask, Refused } from "./api.js";
import { at, decimal, option, title } from "./tools.js";

const MOST_PIXELS = 2 ** 22; // Larger pictures are made smaller before they are sent.
const CLIPS = ["video/mp4", "video/webm", "image/gif"];

const POLICIES = {
  packcache: "Keeps the condition and the newest frame, and of older frames what changed.",
  full: "Keeps every token of every frame.",
  sliding_window: "Keeps the newest frames alone.",
  attention_sink: "Keeps the first tokens and the newest ones.",
  reset: "Drops what it has now and then, but for the newest frames.",
};
const HINTS = {
  history_frames: "How many frames' worth of history is kept",
  window: "How many frames back anything is kept",
  decay: "By how much a frame's share falls from one frame to the next",
  gamma_text: "The share of the text that is kept",
  gamma_condition: "The share of the first picture that is kept",
  selection: "Which blocks of a frame are kept",
  changed_tokens: "From how many differing tokens a block counts as changed",
  episodes: "Of how many scenes that have ended something is kept",
  sink_tokens: "How many of the first tokens are kept",
  recent_tokens: "How many of the newest tokens are kept",
  reset_frames: "After how many frames it drops what it has",
  kept_frames: "How many frames it keeps then",
  seed: "The same seed makes the same video",
  guidance_scale: "How closely the prompt is followed",
  negative_prompt: "What is not to be seen in a guided video",
  negative_prompt_ids: "Token ids in place of the prompt's that guidance leads away from, such as [1, 2, 3]",
  num_inference_steps: "In how many steps a frame is made",
  refresh: "Every so many computed passes all of a frame is computed, in between what is not settled",
  reuse: "A pass is left out before which a smaller share of the frame became known",
  guidance_interval: "Guidance is computed in every so-many-th pass",
  guidance_from: "The share of the passes before guidance begins",
  guidance_until: "The share of the passes where guidance ends",
  temperature: "0: always the likeliest token",
};
const CHOICES = { selection: ["changed", "spatial", "rows", "tail", "random"] };

let about = null;
let picture = null; // A file, or null.
let address = null; // Of the picture as it is shown.
let made = async () => {};

// ------------------------------------------------------------------------------------------------ options

// An option is a value, the default, or {default, least, most, step, choices}.
const described = (spec) => (spec !== null && typeof spec === "object" && !Array.isArray(spec) ? spec : { default: spec });

const text = (value) => (value === null || value === undefined ? "" : Array.isArray(value) ? JSON.stringify(value) : String(value));

function control(prefix, name, given) {
  const spec = described(given);
  const choices = spec.choices ?? (typeof spec.default === "boolean" ? ["true", "false"] : CHOICES[name]);
  const label = document.createElement("label");
  label.className = "field";
  const words = document.createElement("span");
  words.textContent = title(name);
  const input = document.createElement(choices ? "select" : "input");
  if (choices) {
    const all = choices.includes(text(spec.default)) ? choices : [text(spec.default), ...choices];
    input.append(...all.map((choice) => option(choice, choice)));
    input.value = text(spec.default);
  } else if (typeof spec.default === "string" || Array.isArray(spec.default)) {
    input.value = text(spec.default);
  } else {
    input.type = "number";
    input.inputMode = "decimal";
    input.step = spec.step ?? "any";
    if (spec.least !== undefined) input.min = spec.least;
    if (spec.most !== undefined) input.max = spec.most;
    input.value = text(spec.default);
    if (input.value === "") input.placeholder = "by itself";
  }
  input.dataset.field = prefix + name;
  input.dataset.default = text(spec.default);
  if (HINTS[name]) label.title = HINTS[name];
  label.append(words, input);
  return label;
}

const changed = (container) =>
  [...container.querySelectorAll("[data-field]")]
    .filter((input) => input.value !== "" && input.value !== input.dataset.default)
    .map((input) => [input.dataset.field, input.value]);

const defaultsOf = (policy) => ({ ...about.policies[policy], ...(policy === about.policy ? about.options : {}) });

function showPolicy() {
  const policy = at("policy").value;
  const controls = Object.entries(defaultsOf(policy)).map(([name, spec]) => control("packcache_", name, spec));
  at("policy-options").replaceChildren(...controls);
  at("policy-more").hidden = controls.length === 0;
  at("policy-words").textContent = POLICIES[policy] ?? "";
  const other = otherPolicy();
  at("compare").hidden = other === null;
  at("compare").textContent = `Compare with ${other}`;
}

// What one click compares with: the full cache, and of that what the server has.
function otherPolicy() {
  const policy = at("policy").value;
  const others = Object.keys(about.policies).filter((name) => name !== policy);
  return ["full", about.policy, ...others].find((name) => others.includes(name)) ?? null;
}

function showLength() {
  const frames = Number(at("frames").value);
  const { fps, most_frames: most } = about.tokenizer;
  const parts = [];
  if (fps && frames > 0) parts.push(`${decimal(frames / fps)} s at ${fps} a second`);
  if (most) parts.push(`at most ${most} frames`);
  at("length").textContent = parts.join(" · ");
}

// ------------------------------------------------------------------------------------------------ the picture

function showPicture() {
  if (address) URL.revokeObjectURL(address);
  address = picture && URL.createObjectURL(picture);
  const clip = picture?.type.startsWith("video/") ?? false;
  for (const [id, own] of [["shown", !clip], ["shown-clip", clip]]) {
    at(id).hidden = !picture || !own;
    if (picture && own) at(id).src = address;
    else at(id).removeAttribute("src");
  }
  at("drop-words").hidden = picture !== null;
  at("remove").hidden = picture === null;
}

function mark(field) {
  const input = field && document.querySelector(`[data-field="${CSS.escape(field)}"]`);
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  const folded = input.closest("details");
  if (folded) folded.open = true;
  input.focus();
}

function complain(message) {
  at("form-message").textContent = message;
}

// The picture upright and not larger than a server reads.
async function smaller(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Refused(400, "This file is no picture that can be read here: choose a PNG, JPEG or WebP file.");
  }
  const factor = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  if (factor >= 1) {
    bitmap.close();
    return file;
  }
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: Math.round(bitmap.width * factor), height: Math.round(bitmap.height * factor) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((done) => canvas.toBlob(done, file.type === "image/png" ? "image/png" : "image/jpeg", 0.95));
}

async function take(file) {
  if (!file) return;
  complain("");
  const clip = about.tokenizer.clip && CLIPS.includes(file.type);
  try {
    picture = clip ? file : await smaller(file);
  } catch (error) {
    complain(error.message);
    return;
  }
  showPicture();
}

async function photograph() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    complain("There is no camera to be used: allow it in the browser, or choose a file.");
    return;
  }
  const finder = at("finder");
  finder.srcObject = stream;
  at("snap").returnValue = "";
  at("snap").showModal();
  await new Promise((done) => at("snap").addEventListener("close", done, { once: true }));
  if (at("snap").returnValue === "take" && finder.videoWidth > 0) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: finder.videoWidth, height: finder.videoHeight });
    canvas.getContext("2d").drawImage(finder, 0, 0);
    await take(await new Promise((done) => canvas.toBlob(done, "image/png")));
  }
  for (const track of stream.getTracks()) track.stop();
  finder.srcObject = null;
}

function bytesOf(dataUrl) {
  const [head, data] = dataUrl.split(",", 2);
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: /^data:([^;,]*)/.exec(head)?.[1] || "image/png" });
}

// ------------------------------------------------------------------------------------------------ examples

export function useExample(example) {
  at("prompt").value = example.prompt ?? "";
  picture = example.picture ? bytesOf(example.picture) : null;
  showPicture();
  complain("");
}

function exampleButton(example) {
  const button = document.createElement("button");
  button.type = "button";
  if (example.picture) {
    const image = document.createElement("img");
    image.src = example.picture;
    image.alt = "";
    button.append(image);
  }
  const words = document.createElement("span");
  words.textContent = example.prompt || "example";
  button.append(words);
  button.addEventListener("click", () => useExample(example));
  return button;
}

// ------------------------------------------------------------------------------------------------ sending

function body(policy, own, shared) {
  const data = new FormData();
  const { tokenizer } = about;
  if (tokenizer.text === false) data.set("prompt_ids", at("prompt").value.trim());
  else data.set("prompt", at("prompt").value.trim());
  if (tokenizer.size) data.set("size", at("size").value);
  data.set("num_frames", at("frames").value);
  if (picture) data.set("input_reference", picture, `picture.${picture.type.split("/")[1] || "png"}`);
  if (policy !== about.policy) data.set("packcache_policy", policy);
  for (const [field, value] of [...own, ...shared]) data.set(field, value);
  return data;
}

function lacking() {
  const { tokenizer } = about;
  if (at("prompt").value.trim() === "") {
    return tokenizer.text === false ? ["prompt", "Give the prompt's token ids, such as [1, 2, 3]."] : ["prompt", "Say in a few words what is to be seen."];
  }
  if (tokenizer.picture === "required" && !picture) return [null, "This model continues a picture: choose one, or take an example."];
  const wrong = [...at("form").querySelectorAll("input:not([type=file])")].find((input) => !input.checkValidity());
  return wrong && [wrong.dataset.field, `${title(wrong.dataset.field.replace("packcache_", ""))}: ${wrong.validationMessage}`];
}

async function send(compared) {
  complain("");
  for (const input of at("form").querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  const missing = lacking();
  if (missing) {
    complain(missing[1]);
    mark(missing[0]);
    return;
  }
  const policy = at("policy").value;
  const own = changed(at("policy-options"));
  const shared = changed(at("options"));
  // Two videos are to differ in their memory alone.
  const seed = at("options").querySelector('[data-field="seed"]');
  if (compared && seed?.value === "") shared.push(["seed", Math.floor(Math.random() * 2 ** 31)]);
  const wanted = [[policy, own], ...(compared ? [[otherPolicy(), []]] : [])];
  at("form").setAttribute("aria-busy", "true");
  at("make").disabled = at("compare").disabled = true;
  const videos = [];
  try {
    for (const [name, options] of wanted) {
      const video = await ask("POST", "videos", { body: body(name, options, shared) });
      const kept = Object.fromEntries(options.map(([field, value]) => [field.replace("packcache_", ""), value]));
      videos.push({ ...video, options: video.options ?? { policy: name, ...kept } });
    }
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 401) throw error;
    complain(error.status === 503 && error.after ? `The server is full: try again in ${error.after} s.` : error.message);
    mark(error.param);
  } finally {
    at("form").removeAttribute("aria-busy");
    at("make").disabled = at("compare").disabled = false;
  }
  // The first one may have been taken where the second was refused.
  if (videos.length > 0) await made(videos);
}

// ------------------------------------------------------------------------------------------------ the form

export async function openForm(told, whenMade, failed) {
  about = told;
  made = whenMade;
  const { tokenizer } = about;
  const ids = tokenizer.text === false;
  at("prompt-name").textContent = ids ? "Token ids of the prompt" : "Prompt";
  at("prompt").dataset.field = ids ? "prompt_ids" : "prompt";
  at("prompt").placeholder = ids ? "[1, 2, 3]" : "";
  at("picture-field").hidden = (tokenizer.picture ?? "none") === "none";
  at("picture-name").textContent = tokenizer.picture === "optional" ? "Picture, if you like" : "Picture to begin with";
  at("file").accept = ["image/*", ...(tokenizer.clip ? CLIPS : [])].join(",");
  if (tokenizer.clip) at("drop-words").textContent = "Drop a picture or a clip here, or paste one.";
  const sizes = tokenizer.sizes ?? [];
  at("size").replaceChildren(...sizes.map((size) => option(size, size.replace("x", " × "))));
  at("size").value = tokenizer.size ?? "";
  at("size").dataset.field = "size";
  at("size-field").hidden = sizes.length < 2;
  at("frames").dataset.field = "num_frames";
  at("frames").value = tokenizer.frames ?? "";
  if (tokenizer.most_frames) at("frames").max = tokenizer.most_frames;
  at("frames").required = true;
  const names = Object.keys(about.policies);
  at("policy").replaceChildren(...names.map((name) => option(name, name === about.policy ? `${name} (this server's)` : name)));
  at("policy").value = about.policy;
  at("policy").dataset.field = "packcache_policy";
  showPolicy();
  showLength();
  const more = Object.entries(tokenizer.options ?? {}).map(([field, spec]) => {
    const name = field.replace(/^packcache_/, "");
    return control(field.slice(0, field.length - name.length), name, spec);
  });
  at("options").replaceChildren(...more);
  at("more").hidden = more.length === 0;
  const examples = tokenizer.examples ?? [];
  at("examples").replaceChildren(...examples.map(exampleButton));
  at("examples").hidden = examples.length === 0;
  at("first").hidden = examples.length === 0;
  if (examples.length > 0 && at("prompt").value === "" && !picture) useExample(examples[0]);

  const submit = (compared) => send(compared).catch(failed);
  at("form").onsubmit = (event) => {
    event.preventDefault();
    submit(false);
  };
  at("compare").onclick = () => submit(true);
  at("first").onclick = () => {
    useExample(examples[0]);
    submit(otherPolicy() !== null);
  };
  at("policy").onchange = showPolicy;
  at("frames").oninput = showLength;
  at("file").onchange = () => take(at("file").files[0]).then(() => (at("file").value = ""));
  at("remove").onclick = () => {
    picture = null;
    showPicture();
    at("file").focus();
  };
  at("camera").onclick = photograph;
  const field = at("picture-field");
  field.ondragover = (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  };
  field.ondragleave = () => at("drop").classList.remove("over");
  field.ondrop = (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    take(event.dataTransfer.files[0]);
  };
  document.onpaste = (event) => {
    if (!field.hidden && event.clipboardData.files.length > 0) take(event.clipboardData.files[0]);
  };
  const devices = (await navigator.mediaDevices?.enumerateDevices?.().catch(() => [])) ?? [];
  at("camera").hidden = !devices.some((device) => device.kind === "videoinput");
}

// Small things that all parts of the page use.

export const at = (id) => document.getElementById(id);
export const whole = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
export const decimal = (value) => value.toLocaleString("en", { maximumSignificantDigits: value < 100 ? 2 : 3 });

export function option(value, words) {
  return new Option(words, value);
}

// `num_inference_steps` as people write it.
export function title(name) {
  const words = name.replace(/^num_/, "").replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(value < 0.1 ? 3 : value < 1 ? 2 : 1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Resolves with what the dialog was closed by: the value of a button, or nothing.
export function answered(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue), { once: true }));
}

// What a video was made with, in a line: the policy, and what differs from its defaults.
export function memoryOf(video) {
  const { policy, ...options } = video.options ?? {};
  const short = (value) => (Array.isArray(value) && value.length > 8 ? `of ${value.length}` : value);
  const differing = Object.entries(options).map(([name, value]) => `${name.replaceAll("_", " ")} ${short(value)}`);
  return { policy: policy ?? null, options: differing.join(", ") };
}

// The server: what it is asked, and the events of a video.

const SHORTEST_PAUSE = 500; // Milliseconds before a lost connection is made again; each failure doubles them.
const LONGEST_PAUSE = 8_000;
const LAST = new Set(["completed", "failed"]); // Events after which there are none.

export class Refused extends Error {
  constructor(status, message, { param = null, after = null } = {}) {
    super(message);
    Object.assign(this, { status, param, after });
  }

  // Whether asking again may help.
  get passing() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

let secret = null; // Never stored: a page that is loaded again asks again.

export const hasKey = () => secret !== null;

export function useKey(key) {
  secret = key;
}

async function call(method, path, { body, headers, signal } = {}) {
  let answer;
  try {
    answer = await fetch(new URL(`v1/${path}`, document.baseURI), {
      method,
      headers: { ...(secret !== null && { Authorization: `Bearer ${secret}` }), ...headers },
      body,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, "The server does not answer: see whether it still runs.");
  }
  if (answer.ok) return answer;
  const said = (await answer.json().catch(() => null))?.error;
  const message = said?.message ?? `The server answers ${answer.status}.`;
  throw new Refused(answer.status, message, { param: said?.param, after: answer.headers.get("Retry-After") });
}

export const ask = async (method, path, more) => (await call(method, path, more)).json();

export const askJson = (method, path, body) =>
  ask(method, path, { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

export const fetchBlob = async (path) => (await call("GET", path)).blob();

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: "", kind: "message", data: [] };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        const [, name, text] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
        if (line === "") {
          if (event.data.length > 0) yield { ...event, data: JSON.parse(event.data.join("\n")) };
          event = { id: "", kind: "message", data: [] };
        } else if (name === "id") event.id = text ?? "";
        else if (name === "event") event.kind = text ?? "";
        else if (name === "data") event.data.push(text ?? "");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function pause(milliseconds, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), done()), { once: true });
  });
}

// All events of a video, from the first one to the last, over as many connections as that takes.
export async function* follow(id, signal, connected) {
  let last = "";
  let next = SHORTEST_PAUSE;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
      const answer = await call("GET", `videos/${encodeURIComponent(id)}/events`, { headers, signal });
      connected(true);
      for await (const event of eventsOf(answer.body)) {
        last = event.id || last;
        next = SHORTEST_PAUSE;
        yield event;
        if (LAST.has(event.kind)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && !error.passing) throw error;
    }
    connected(false);
    await pause(next, signal);
    next = Math.min(2 * next, LONGEST_PAUSE);
  }
}

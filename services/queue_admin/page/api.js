// The calls of queue_admin, with the token where one is needed.

const KEPT_AS = "queue_admin.token";
const TIMEOUT_MS = 30_000;

/** Thrown when queue_admin refuses: problem details (RFC 9457). */
export class Problem extends Error {
  constructor(status, body) {
    const fields = Object.entries(body.errors ?? {}).map(
      ([name, said]) => `${name}: ${said.join(" ")}`,
    );
    super(fields.join("; ") || body.detail || body.title || `HTTP status ${status}`);
    this.status = status;
    this.errors = body.errors ?? {};
  }
}

// for this tab alone, and only until it is closed
export const token = {
  get: () => sessionStorage.getItem(KEPT_AS),
  keep: (given) => sessionStorage.setItem(KEPT_AS, given),
  forget: () => sessionStorage.removeItem(KEPT_AS),
};

/** Return the text of an answer. Numbers of a payload may be longer than JavaScript's are. */
export async function fetchText(method, path, body) {
  const headers = {};
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  const answer = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  const text = await answer.text();
  if (!answer.ok) throw new Problem(answer.status, parsed(text));
  return text;
}

export async function call(method, path, body) {
  return JSON.parse(
    await fetchText(method, path, body === undefined ? body : JSON.stringify(body)),
  );
}

export const get = (path) => call("GET", path);
export const post = (path, body) => call("POST", path, body);
export const put = (path, body) => call("PUT", path, body);
export const remove = (path) => call("DELETE", path);

/** Make a path: what is put into it cannot leave its place. */
export function path(strings, ...values) {
  return String.raw({ raw: strings }, ...values.map(encodeURIComponent));
}

/** What queue_admin says of itself; without a token, and red as well. */
export async function health() {
  const answer = await fetch("/queue/health", {
    signal: AbortSignal.timeout(TIMEOUT_MS),
    cache: "no-store",
  });
  return answer.json();
}

function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}

// The one place that talks to the server: the key, errors as sentences, JSON answers, and streams of events.

const KEY = "mlx-omni-server-key";

/** What the server refused, or that it does not answer. Its message is a sentence for people. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  /** The key that was typed in; it is forgotten when the tab is closed. */
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Send a request, and return the response if it is no error. Addresses are relative to the page's own. */
export async function send(path, { body, signal, method = body === undefined ? "GET" : "POST" } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. If it has ended, start it again; this page goes on by itself.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: something between this page and the server has answered.
  }
  const message = error.message ? sentence(error.message) : `The server answered with the status ${response.status}.`;
  return new ApiError(message, { status: response.status, code: error.code });
}

/** A line as a sentence: with a full stop and, unless something stands before it, a capital letter. */
export function sentence(text, isWhole = true) {
  const end = /[.!?…]$/.test(text) ? "" : ".";
  return (isWhole ? text.charAt(0).toUpperCase() + text.slice(1) : text) + end;
}

export const getJson = async (path, options) => (await send(path, options)).json();
export const manage = (path, body) => getJson(`manage/v1/${path}`, body === undefined ? {} : { body });

/** Yield the data of each server-sent event in a response, until it ends. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part
        .split("\n")
        .filter((line) => line.startsWith("data: "))
        .map((line) => line.slice(6))
        .join("\n");
      if (data) yield data;
    }
  }
}

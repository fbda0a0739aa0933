// The page: it asks the server what it holds and does, and draws one of three views.

import { html, nothing, render } from "./vendor/lit-html/lit-html.js";
import { ApiError, key, manage } from "./api.js";
import { chatView } from "./chat.js";
import { modelsView } from "./models.js";
import { requestsView } from "./requests.js";

const STATUS_MS = 1000;
const MODELS_MS = 10000;

/** All that is drawn. Views read it; only this module and `act` write it. */
const state = {
  status: null,
  models: null,
  /** null while they are looked for. */
  problems: null,
  requests: { running: [], ended: [] },
  unreachable: null,
  busy: new Set(),
};
const views = {
  models: { title: "Models", draw: modelsView },
  chat: { title: "Chat", draw: chatView },
  requests: { title: "Requests", draw: requestsView },
};
const main = document.querySelector("main");
let shown = null;
let modelsAt = 0;

/** What views may do. */
const actions = {
  draw,
  say,
  /** Tell the server to do something, named for the button that waits for it, and look at it again. */
  async act(name, path, body) {
    state.busy.add(name);
    draw();
    try {
      await manage(path, body);
    } catch (error) {
      const again = () => actions.act(name, path, { ...body, force: true });
      if (error.code === "model_busy") say(error.message, "Unload anyway", again);
      else report(error);
    }
    state.busy.delete(name);
    modelsAt = 0;
    await look();
  },
  async findProblems() {
    state.problems = null;
    draw();
    try {
      state.problems = (await manage("problems")).problems;
    } catch (error) {
      state.problems = [];
      report(error);
    }
    draw();
  },
  go(view, model) {
    location.hash = model ? `${view}/${encodeURIComponent(model)}` : view;
  },
};

/** Show a sentence, which screen readers speak at once, until it is closed; with a button for what may follow. */
function say(text, label = null, follow = null) {
  const close = () => render(nothing, document.querySelector("#alert"));
  const go = () => {
    close();
    follow();
  };
  render(
    html`<p>${text}
      ${label ? html`<button type="button" class="quiet" @click=${go}>${label}</button>` : nothing}
      <button type="button" class="quiet" aria-label="Close this message" @click=${close}>×</button></p>`,
    document.querySelector("#alert"),
  );
}

function report(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) askForKey(key.get() ? "The server did not take this key." : "");
  else if (error.status === 403 && key.get()) askForKey(error.message);
  else say(error.message);
}

/** Ask the server what has changed, and draw it. */
async function look() {
  try {
    const before = state.status;
    state.status = await manage("status");
    state.unreachable = null;
    if (before === null) actions.findProblems();
    if (hasFinished(before, state.status)) modelsAt = 0;
    if (shown !== "requests" && (performance.now() - modelsAt > MODELS_MS || modelsAt === 0)) {
      modelsAt = performance.now();
      state.models = (await manage("models")).models;
    }
    if (shown === "requests") state.requests = await manage("requests");
  } catch (error) {
    if (error.status === 401 || error.status === 403) report(error);
    else if (error instanceof ApiError) state.unreachable = error.message;
    else throw error;
  }
  draw();
}

/** Whether a download has ended, or a model has come or gone, so that the list of models is another one. */
function hasFinished(before, now) {
  const shape = (status) =>
    JSON.stringify([
      status?.models.map((each) => [each.id, each.state]),
      status?.downloads.map((each) => [each.model, each.state]),
    ]);
  return shape(before) !== shape(now);
}

async function keepLooking() {
  while (true) {
    if (!document.hidden && !document.querySelector("#key").open) await look();
    await new Promise((resolve) => setTimeout(resolve, STATUS_MS));
  }
}

function draw() {
  const [name, model] = location.hash.slice(1).split("/");
  const view = views[name] ? name : "models";
  if (view !== shown) {
    const isFirst = shown === null;
    shown = view;
    document.title = `${views[view].title} – mlx-omni-server`;
    if (!isFirst) main.focus({ preventScroll: true });
    if (view === "requests") look();
  }
  const links = Object.entries(views).map(
    ([id, { title }]) => html`<a href="#${id}" aria-current=${id === view ? "page" : nothing}>${title}</a>`,
  );
  render(html`${links}<a href="docs">API</a>`, document.querySelector("#nav"));
  render(stateLine(), document.querySelector("#state"));
  const chosen = model ? decodeURIComponent(model) : null;
  render(state.status ? views[view].draw(state, actions, chosen) : waiting(), main);
}

const waiting = () => html`<p class="hint">${state.unreachable ?? "Asking the server …"}</p>`;

const SAYS = {
  starting: "starting",
  loading: "loading a model",
  ready: "ready",
  waiting: "waiting for a disk",
  failed: "failed",
};

function stateLine() {
  if (state.unreachable) return html`<span class="dot failed"></span>no answer from the server`;
  if (!state.status) return html`connecting`;
  return html`<span class="dot ${state.status.state}"></span>${SAYS[state.status.state]}`;
}

/** Ask for the key in a dialog, which cannot be left without one. */
function askForKey(problem) {
  const dialog = document.querySelector("#key");
  const take = (event) => {
    event.preventDefault();
    key.set(new FormData(event.target).get("key").trim());
    dialog.close();
    look();
  };
  render(
    html`<form @submit=${take}>
      <h2 id="key-title">This server needs a key</h2>
      ${problem ? html`<p role="alert">${problem}</p>` : nothing}
      <label>API key <input name="key" type="password" required autocomplete="off" autofocus></label>
      <p class="hint">
        It is what the server has in MLX_OMNI_API_KEY, or a key that <code>mlx-omni-server key add</code> made for all
        models. This tab keeps it until you close it.
      </p>
      <button>Go on</button>
    </form>`,
    dialog,
  );
  if (!dialog.open) dialog.showModal();
}

addEventListener("hashchange", draw);
document.addEventListener("visibilitychange", () => document.hidden || look());
draw();
keepLooking();

// Downloads by id: begun, watched, cancelled, and gone on with.

import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { repeat } from "./vendor/lit-html/directives/repeat.js";
import { bytes, seconds } from "./format.js";

/** By model: [when, bytes] of the looks at a download that runs, for its speed. */
const looks = new Map();
const LOOKS = 10;

export function downloadsPart(state, actions) {
  if (state.status.offline) return nothing;
  const begin = (event) => {
    event.preventDefault();
    const model = new FormData(event.target).get("model").trim();
    actions.act("download", "downloads", { model });
    event.target.reset();
  };
  return html`<section aria-labelledby="downloads-title">
    <h2 id="downloads-title">Download</h2>
    <form class="line" @submit=${begin}>
      <label>Id on the Hub <input name="model" required placeholder="org/name" spellcheck="false" autocapitalize="off"></label>
      <button ?disabled=${state.busy.has("download")}>Download</button>
    </form>
    <ul class="downloads">
      ${repeat(state.status.downloads, (each) => each.model, (each) => row(each, state, actions))}
    </ul>
  </section>`;
}

function row(download, state, actions) {
  const { model } = download;
  const button = (text, path) => html`<button
    type="button"
    aria-label="${text} ${model}"
    ?disabled=${state.busy.has(`${path} ${model}`)}
    @click=${() => actions.act(`${path} ${model}`, path, { model })}
  >${text}</button>`;
  const isRunning = download.state === "waiting" || download.state === "downloading";
  const what = isRunning
    ? button("Cancel", "downloads/cancel")
    : download.state === "done"
      ? nothing
      : button("Resume", "downloads");
  return html`<li>
    <span class="id">${model}</span>
    ${isRunning && download.total
      ? html`<progress max=${download.total} value=${download.done} aria-label="Download of ${model}"></progress>`
      : isRunning
        ? html`<progress aria-label="Download of ${model}"></progress>`
        : nothing}
    <span class="hint">${text(download)}</span> ${what}
  </li>`;
}

function text(download) {
  const { state, done, total, message } = download;
  if (state === "waiting") return "asking the Hub …";
  if (state === "done") return `done${total ? `, ${bytes(total)}` : ""}`;
  if (state === "failed") return message;
  const part = total ? `${bytes(done)} of ${bytes(total)}` : "beginning …";
  if (state === "cancelled") return total ? `cancelled at ${part}; it goes on from there` : "cancelled";
  return `${part}${speed(download)}`;
}

/** The speed of the last looks at a download, and the time that is left. */
function speed({ model, done, total }) {
  const seen = looks.get(model) ?? [];
  const now = performance.now() / 1000;
  if (!seen.length || now - seen.at(-1)[0] > 0.5) seen.push([now, done]);
  looks.set(model, seen.slice(-LOOKS));
  const [at, before] = seen[0];
  if (now - at < 1 || done <= before) return "";
  const perSecond = (done - before) / (now - at);
  return `, ${bytes(perSecond)}/s, ${seconds((total - done) / perSecond)} left`;
}

// The view of models: what the server does and holds now, every model there is, downloads, and problems.

import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { repeat } from "./vendor/lit-html/directives/repeat.js";
import { sentence } from "./api.js";
import { downloadsPart } from "./downloads.js";
import { bytes, rate, seconds, tokens } from "./format.js";

const SOURCES = { map: "mapped folder", custom: "your folder", cache: "Hugging Face cache", tier: "shared folder" };
const USES = {
  weights: "Weights of models",
  running: "Requests that run",
  kept: "Kept for later prompts",
  disk: "Kept on disk for later ones",
};
/** Kinds of models that no chat can be had with. */
export const NO_CHAT = new Set(["embedding", "reranker", "transcription", "speech"]);

/** Models that the table shows at once, unless all are asked for: those on their way to memory, or in it, come first. */
const MOST = 100;

let filter = "";
let showsAll = false;

export function modelsView(state, actions) {
  return html`
    ${state.status.message ? html`<p class="warning" role="alert">${state.status.message}</p>` : nothing}
    ${activity(state.status)} ${memory(state.status.memory)} ${modelsPart(state, actions)}
    ${downloadsPart(state, actions)} ${problemsPart(state, actions)}
  `;
}

function activity({ activity: now, uptime_seconds: uptime }) {
  const figures = [
    ["Tokens per second", rate(now.tokens_per_second)],
    ["Time to first token", seconds(now.first_token_seconds)],
    ["Answers under way", now.running],
    ["Waiting", now.waiting],
    ["Running for", seconds(uptime)],
  ];
  return html`<section aria-labelledby="now-title">
    <h2 id="now-title">Now</h2>
    <dl class="figures">${figures.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
  </section>`;
}

function memory({ usable, uses }) {
  const rows = uses.map((each) => {
    const name = USES[each.use] ?? each.use;
    const text = each.limit == null ? bytes(each.bytes) : `${bytes(each.bytes)} of ${bytes(each.limit)}`;
    return html`<div class="use">
      <dt>${name}</dt>
      <dd>
        <meter min="0" max=${each.limit || 1} value=${each.bytes} aria-label=${name}></meter>
        <span>${text}</span>
      </dd>
    </div>`;
  });
  return html`<section aria-labelledby="memory-title">
    <h2 id="memory-title">Memory</h2>
    <dl class="uses">${rows}</dl>
    ${usable == null ? nothing : html`<p class="hint">MLX may use ${bytes(usable)} on this machine.</p>`}
  </section>`;
}

function modelsPart(state, actions) {
  if (state.models === null) return html`<p class="hint">Looking for models …</p>`;
  if (!state.models.length) return noModels(state);
  const live = new Map(state.status.models.map((each) => [each.id, each]));
  const wanted = state.models.filter((each) => each.id.toLowerCase().includes(filter.toLowerCase()));
  const isCut = wanted.length > MOST && !showsAll;
  const shown = isCut
    ? [...wanted.filter((each) => live.has(each.id)), ...wanted.filter((each) => !live.has(each.id))].slice(0, MOST)
    : wanted;
  const showAll = () => {
    showsAll = true;
    actions.draw();
  };
  const filtered = (event) => {
    filter = event.target.value;
    actions.draw();
  };
  return html`<section aria-labelledby="models-title">
    <div class="head">
      <h2 id="models-title">Models</h2>
      <label class="search"><span>Find</span> <input type="search" .value=${filter} @input=${filtered}></label>
    </div>
    <table class="cards">
      <thead>
        <tr>
          <th scope="col">Model</th>
          <th scope="col">Where</th>
          <th scope="col">Size</th>
          <th scope="col">Context</th>
          <th scope="col">State</th>
          <th scope="col"><span class="unseen">What to do</span></th>
        </tr>
      </thead>
      <tbody>
        ${repeat(shown, (each) => each.id, (each) => modelRow(each, live.get(each.id), state, actions))}
      </tbody>
    </table>
    ${wanted.length ? nothing : html`<p class="hint">No model has that in its name.</p>`}
    ${isCut
      ? html`<p class="hint">
          ${shown.length} of ${wanted.length} models; find one by a part of its name, or
          <button type="button" @click=${showAll}>show all</button>
        </p>`
      : nothing}
  </section>`;
}

function modelRow(model, live, state, actions) {
  const now = live?.state ?? (["away", "on disk"].includes(model.state) ? model.state : "on disk");
  const isPinned = live?.pinned ?? model.pinned;
  const marks = [
    model.kind === "text" ? null : model.kind,
    model.images ? "images" : null,
    model.default ? "default" : null,
    ...model.aliases.map((alias) => `also ${alias}`),
  ].filter(Boolean);
  return html`<tr>
    <th scope="row">
      <span class="id">${model.id}</span>
      ${marks.map((mark) => html` <span class="mark">${mark}</span>`)}
      ${model.architecture ? html`<span class="hint">${model.architecture}</span>` : nothing}
    </th>
    <td data-name="Where" title=${model.source.path || model.source.root}>
      ${SOURCES[model.source.kind] ?? model.source.kind}
      ${now === "away" ? html`<span class="hint">${model.source.root}</span>` : nothing}
    </td>
    <td data-name="Size">${model.bytes ? bytes(model.bytes) : "–"}</td>
    <td data-name="Context">${context(model)}</td>
    <td data-name="State">${stateOf(now, live, isPinned)}</td>
    <td class="buttons">${buttons(model, now, live, isPinned, state, actions)}</td>
  </tr>`;
}

function context({ context_length: whole, usable_context: usable }) {
  if (usable == null || whole == null || usable >= whole) return tokens(whole ?? usable);
  return html`${tokens(usable)} <span class="hint">of ${tokens(whole)} fit in memory</span>`;
}

function stateOf(now, live, isPinned) {
  const pin = isPinned
    ? html` <span class="mark" title="Until the server ends; for good with pin in a profile">pinned</span>`
    : nothing;
  if (now === "resident") {
    const users = live?.users ?? 0;
    const use = users ? `in use by ${users}` : live?.idle_seconds != null ? `idle for ${seconds(live.idle_seconds)}` : "";
    return html`<span class="dot ready"></span>in memory${pin} <span class="hint">${use}</span>`;
  }
  if (now === "loading" || now === "downloading") {
    const isReading = live.read > 0 && live.bytes > 0;
    const note = isReading ? `${bytes(live.read)} of ${bytes(live.bytes)}` : live.note;
    const bar = isReading
      ? html`<progress aria-label="Loading" max=${live.bytes} value=${live.read}></progress>`
      : html`<progress aria-label="Loading"></progress>`;
    return html`${bar} <span class="hint">${note}</span>`;
  }
  if (now === "away") return html`<span class="dot failed"></span>away: connect its drive`;
  return html`on disk${pin}`;
}

function buttons(model, now, live, isPinned, state, actions) {
  const { id } = model;
  const button = (text, path, body) => {
    const name = `${path} ${id}`;
    return html`<button
      type="button"
      aria-label="${text} ${id}"
      ?disabled=${state.busy.has(name)}
      @click=${() => actions.act(name, path, { model: id, ...body })}
    >${text}</button>`;
  };
  if (now === "away") return nothing;
  if (now === "loading" || now === "downloading") return button("Give up", "models/unload", { force: true });
  const pin = isPinned
    ? button("Unpin", "models/pin", { pinned: false })
    : button("Pin", "models/pin", { pinned: true });
  const chat = NO_CHAT.has(model.kind)
    ? nothing
    : html`<button type="button" aria-label="Chat with ${id}" @click=${() => actions.go("chat", id)}>Chat</button>`;
  const main =
    now === "resident" ? button("Unload", "models/unload", { force: false }) : button("Load", "models/load", {});
  return html`${chat} ${main} ${pin}`;
}

function noModels(state) {
  return html`<section aria-labelledby="none-title">
    <h2 id="none-title">No models yet</h2>
    ${state.status.offline
      ? html`<p>The server is offline, so it downloads nothing. Start it with your own folder of models:</p>`
      : html`<p>
            Download one below: an id from the Hub such as <code>mlx-community/Qwen3-4B-4bit</code>. Or start the server
            with your own folder of models:
          </p>`}
    <pre><code>mlx-omni-server --model-path /Volumes/LLMS/models</code></pre>
    <p class="hint">Folders that look like models and are left out are listed below, each with the reason.</p>
  </section>`;
}

function problemsPart({ problems }, actions) {
  return html`<section aria-labelledby="problems-title">
    <div class="head">
      <h2 id="problems-title">Problems</h2>
      <button type="button" ?disabled=${problems === null} @click=${actions.findProblems}>Look again</button>
    </div>
    ${problems === null
      ? html`<p class="hint">Looking …</p>`
      : problems.length
        ? html`<ul class="problems">
            ${problems.map(
              (each) => html`<li><strong>${each.where}</strong> ${sentence(each.what, false)} <span class="advice">${each.advice}</span></li>`,
            )}
          </ul>`
        : html`<p class="hint">None found: every folder that looks like a model can be loaded.</p>`}
  </section>`;
}

// The view that tries a model: a conversation, its parameters, and the same request for a program.

import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { repeat } from "./vendor/lit-html/directives/repeat.js";
import { events, key, send, sentence } from "./api.js";
import { rate, seconds } from "./format.js";
import { copyButton, markdown } from "./markdown.js";
import { NO_CHAT } from "./models.js";
import { curl, python } from "./snippets.js";

const DRAW_MS = 80;
const MAX_IMAGE = 20e6; // bytes of a file: the server takes bodies of 64 MB

/** Of each parameter: its name in the request, its label, and what its field takes. */
const PARAMETERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: "any" }],
  ["top_p", "Top p", { min: 0, max: 1, step: "any" }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: "any" }],
  ["max_tokens", "Most tokens", { min: 1, step: 1 }],
  ["seed", "Seed", { step: 1 }],
];

const chat = {
  model: null,
  system: "",
  /** What is typed into the fields of parameters, by their names. */
  fields: {},
  /** Turns: role, text, images (data URLs); of answers also reasoning, figures, error, and the elements drawn. */
  turns: [],
  images: [],
  draft: "",
  running: null,
  spoken: "",
  showsSnippets: false,
};
let number = 0;

export function chatView(state, actions, asked) {
  const models = (state.models ?? []).filter((each) => !NO_CHAT.has(each.kind) && each.state !== "away");
  if (!models.length) {
    return html`<h2>Chat</h2>
      <p class="hint">There is no model to chat with yet. <a href="#models">Get one first.</a></p>`;
  }
  if (asked && models.some((each) => each.id === asked) && chat.asked !== asked) chat.model = asked;
  chat.asked = asked;
  const chosen = models.find((each) => each.id === chat.model) ?? preferred(models);
  chat.model = chosen.id;
  return html`
    <div class="head">
      <h2>Chat</h2>
      <button type="button" ?disabled=${!chat.turns.length || chat.running} @click=${() => clear(actions)}>
        New conversation
      </button>
    </div>
    <label class="wide">Model
      <select id="model" @change=${(event) => { chat.model = event.target.value; actions.draw(); }}>
        ${repeat(models, (each) => each.id, (each) => html`<option value=${each.id} .selected=${each.id === chat.model}>
          ${each.id}${each.state === "resident" ? " (in memory)" : ""}
        </option>`)}
      </select>
    </label>
    ${settings(actions)}
    <div class="turns" role="log" aria-label="Conversation" aria-live="off">
      ${repeat(chat.turns, (each) => each.number, (each) => turn(each))}
    </div>
    <p class="unseen" role="status">${chat.spoken}</p>
    ${composer(chosen, actions)} ${snippets(actions)}
  `;
}

/** The model that is offered first: the server's default, else one in memory, else the first. */
const preferred = (models) =>
  models.find((each) => each.default) ?? models.find((each) => each.state === "resident") ?? models[0];

function settings(actions) {
  const set = (name) => (event) => {
    chat.fields[name] = event.target.value;
    actions.draw();
  };
  const setSystem = (event) => {
    chat.system = event.target.value;
    actions.draw();
  };
  return html`<details class="settings">
    <summary>Parameters</summary>
    <label class="wide">System prompt <textarea rows="2" .value=${chat.system} @input=${setSystem}></textarea></label>
    <div class="fields">
      ${PARAMETERS.map(
        ([name, label, { min, max, step }]) => html`<label>${label}
          <input
            type="number"
            name=${name}
            min=${min ?? nothing}
            max=${max ?? nothing}
            step=${step}
            placeholder="model's own"
            .value=${chat.fields[name] ?? ""}
            @input=${set(name)}
          >
        </label>`,
      )}
    </div>
  </details>`;
}

function turn(each) {
  return html`<article class="turn ${each.role}" aria-label=${each.role === "user" ? "You" : "Answer"}>
    ${each.images?.map((image) => html`<img src=${image} alt="A picture that you sent">`)}
    ${each.reasoning
      ? html`<details class="reasoning"><summary>Reasoning</summary><div class="plain">${each.reasoning}</div></details>`
      : nothing}
    ${each.role === "user" ? html`<div class="plain">${each.text}</div>` : each.element}
    ${each.error ? html`<p class="warning" role="alert">${each.error}</p>` : nothing}
    ${each.note ? html`<p class="hint">${each.note}</p>` : nothing}
  </article>`;
}

function composer(model, actions) {
  const submit = (event) => {
    event.preventDefault();
    if (!chat.running && (chat.draft.trim() || chat.images.length)) ask(actions, event.target.querySelector("textarea"));
  };
  const typed = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      event.target.form.requestSubmit();
    }
  };
  const drafted = (event) => {
    chat.draft = event.target.value;
    actions.draw();
  };
  const attached = async (event) => {
    for (const file of event.target.files) await attach(file, actions);
    event.target.value = "";
  };
  return html`<form class="composer" @submit=${submit}>
    <label class="wide"><span class="unseen">Message</span>
      <textarea rows="3" placeholder="Say something; Enter sends, Shift+Enter begins a line" @keydown=${typed}
        .value=${chat.draft} @input=${drafted}></textarea>
    </label>
    ${chat.images.map((image, at) => html`<span class="attached">
      <img src=${image} alt="Picture ${at + 1}, to be sent">
      <button type="button" class="quiet" aria-label="Remove picture ${at + 1}"
        @click=${() => { chat.images.splice(at, 1); actions.draw(); }}>×</button>
    </span>`)}
    <div class="line">
      ${model.images
        ? html`<label class="file">Add pictures <input type="file" accept="image/*" multiple @change=${attached}></label>`
        : nothing}
      ${chat.running
        ? html`<button type="button" @click=${() => chat.running.abort()}>Stop</button>`
        : html`<button ?disabled=${!chat.draft.trim() && !chat.images.length}>Send</button>`}
    </div>
  </form>`;
}

async function attach(file, actions) {
  if (file.size > MAX_IMAGE) return actions.say(`${file.name} is larger than 20 MB; send a smaller picture.`);
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  chat.images.push(url);
  actions.draw();
}

function clear(actions) {
  chat.turns = [];
  actions.draw();
}

/** The request for the conversation so far, and for what is being typed. */
function request(turns) {
  const messages = turns.filter((each) => !each.error || each.text).map(message);
  if (chat.system.trim()) messages.unshift({ role: "system", content: chat.system });
  return { model: chat.model, messages, ...parameters(), stream: true, stream_options: { include_usage: true } };
}

/** The parameters that are filled in. */
function parameters() {
  const filled = PARAMETERS.map(([name]) => [name, chat.fields[name]?.trim()]).filter(([, text]) => text);
  return Object.fromEntries(filled.map(([name, text]) => [name, Number(text)]));
}

function message({ role, text, images }) {
  if (!images?.length) return { role, content: text };
  const pictures = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: [...pictures, { type: "text", text }] };
}

async function ask(actions, field) {
  chat.turns.push({ number: number++, role: "user", text: chat.draft.trim(), images: chat.images });
  const body = request(chat.turns);
  const element = document.createElement("div");
  element.className = "markdown";
  const answer = { number: number++, role: "assistant", text: "", reasoning: "", note: "waiting …", element };
  chat.turns.push(answer);
  chat.draft = "";
  chat.images = [];
  chat.running = new AbortController();
  chat.spoken = "Waiting for the answer.";
  actions.draw();
  const drawing = setInterval(() => drawAnswer(answer, actions), DRAW_MS);
  const began = performance.now();
  try {
    await read(await send("v1/chat/completions", { body, signal: chat.running.signal }), answer, began);
    chat.spoken = `The answer is: ${answer.text.slice(0, 500)}`;
  } catch (error) {
    if (error.name === "AbortError") answer.note = "stopped";
    else {
      answer.error = error.message;
      answer.note = "";
    }
    chat.spoken = "The answer has ended.";
  }
  clearInterval(drawing);
  chat.running = null;
  drawAnswer(answer, actions, true);
  field.focus();
}

/** Read an answer's events into the turn that shows it. Raises the error that it ends in. */
async function read(response, answer, began) {
  let first = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(sentence(chunk.error.message));
    const delta = chunk.choices?.[0]?.delta;
    if (delta?.content || delta?.reasoning_content) first ??= performance.now();
    answer.text += delta?.content ?? "";
    answer.reasoning += delta?.reasoning_content ?? "";
    if (chunk.usage) answer.note = figures(chunk.usage, began, first);
  }
}

function figures(usage, began, first) {
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const parts = [`${usage.prompt_tokens} tokens in${cached ? ` (${cached} cached)` : ""}`];
  parts.push(`${usage.completion_tokens} out`);
  if (first !== null) {
    parts.push(`first after ${seconds((first - began) / 1000)}`);
    const took = (performance.now() - first) / 1000;
    if (usage.completion_tokens > 1 && took > 0.1) parts.push(`${rate((usage.completion_tokens - 1) / took)} tokens/s`);
  }
  return parts.join(", ");
}

function drawAnswer(answer, actions, isWhole = false) {
  if (answer.drawn === answer.text.length && !isWhole) return actions.draw();
  answer.drawn = answer.text.length;
  if (answer.text && answer.note === "waiting …") answer.note = "";
  const isAtEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
  answer.element.replaceChildren(markdown(answer.text));
  actions.draw();
  if (isAtEnd) scrollTo({ top: document.documentElement.scrollHeight });
}

function snippets(actions) {
  const toggled = (event) => {
    chat.showsSnippets = event.target.open;
    actions.draw();
  };
  return html`<details class="snippets" ?open=${chat.showsSnippets} @toggle=${toggled}>
    <summary>The same request as curl and Python</summary>
    ${chat.showsSnippets ? texts() : nothing}
  </details>`;
}

function texts() {
  const body = request(asIfSent());
  for (const each of body.messages) each.content = shortened(each.content);
  const url = new URL(".", location.href).href.replace(/\/$/, "");
  const programs = [
    ["curl", curl(url, body, key.get() !== null)],
    ["Python", python(url, body, key.get() !== null)],
  ];
  return programs.map(
    ([name, text]) => html`<h3>${name}</h3>
      <div class="snippet"><pre tabindex="0"><code>${text}</code></pre>${copier(name, text)}</div>`,
  );
}

/** The turns of the request that was sent last, or that would be sent now. */
function asIfSent() {
  const draft = chat.draft.trim();
  if (draft) return [...chat.turns, { role: "user", text: draft, images: chat.images }];
  const last = chat.turns.findLastIndex((each) => each.role === "user");
  return last < 0 ? [{ role: "user", text: "Hello!" }] : chat.turns.slice(0, last + 1);
}

/** Pictures are too long to be shown. */
function shortened(content) {
  if (typeof content === "string") return content;
  return content.map((part) =>
    part.image_url ? { ...part, image_url: { url: `${part.image_url.url.slice(0, 40)}…` } } : part,
  );
}

const copiers = new Map();

/** One button for each snippet, which copies the text as it is now. */
function copier(name, text) {
  if (!copiers.has(name)) {
    const entry = { text };
    entry.button = copyButton(() => entry.text);
    copiers.set(name, entry);
  }
  const entry = copiers.get(name);
  entry.text = text;
  return entry.button;
}

// The page of the API: what /openapi.json says of each route, with every field of its bodies and answers.

import { html, nothing, render } from "./vendor/lit-html/lit-html.js";
import { getJson, key } from "./api.js";

const DEEPEST = 4;
const main = document.querySelector("main");

let schemas = {};

/** Return the schema that a reference leads to, and its name. */
function resolved(schema) {
  const name = schema.$ref?.split("/").at(-1);
  return name ? [schemas[name] ?? {}, name] : [schema, null];
}

/** Return a schema's type in a few words. */
function typeOf(schema) {
  const [found, name] = resolved(schema);
  const several = found.anyOf ?? found.oneOf ?? found.allOf;
  if (several) return several.map(typeOf).join(" or ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((each) => JSON.stringify(each)).join(" or ");
  if (found.type === "array") return `list of ${typeOf(found.items ?? {})}`;
  return name ?? found.type ?? "anything";
}

/** Return the schemas of objects in a schema, which have fields of their own. */
function objects(schema) {
  const [found] = resolved(schema);
  if (found.properties) return [found];
  if (found.type === "array") return objects(found.items ?? {});
  return (found.anyOf ?? found.oneOf ?? found.allOf ?? []).flatMap(objects);
}

function fields(schema, depth = 0, above = []) {
  const found = objects(schema).filter((each) => !above.includes(each));
  if (!found.length || depth > DEEPEST) return nothing;
  const rows = found.flatMap((each) =>
    Object.entries(each.properties).map(([name, field]) => {
      const [about] = resolved(field);
      const inner = objects(field).length && depth < DEEPEST && !objects(field).some((one) => [...above, ...found].includes(one));
      return html`<dt>${name}${each.required?.includes(name) ? html` <span class="mark">required</span>` : nothing}</dt>
        <dd>
          <span class="hint">${typeOf(field)}${field.default == null ? "" : `, default ${JSON.stringify(field.default)}`}</span>
          ${field.description ?? about.description ?? nothing}
          ${inner
            ? html`<details><summary>its fields</summary>${fields(field, depth + 1, [...above, ...found])}</details>`
            : nothing}
        </dd>`;
    }),
  );
  return html`<dl>${rows}</dl>`;
}

function route(path, method, about) {
  const body = about.requestBody?.content?.["application/json"]?.schema;
  const answered = about.responses?.[200]?.content?.["application/json"]?.schema;
  const parameters = (about.parameters ?? []).map((each) => `${each.name} (in ${each.in})`).join(", ");
  return html`<section>
    <h3>${method.toUpperCase()} ${path}</h3>
    <p>${about.description ?? about.summary}</p>
    ${parameters ? html`<p class="hint">Parameters: ${parameters}</p>` : nothing}
    ${body ? html`<details><summary>Body</summary>${fields(body)}</details>` : nothing}
    ${answered ? html`<details><summary>Answer</summary>${fields(answered)}</details>` : nothing}
  </section>`;
}

function page(document) {
  schemas = document.components?.schemas ?? {};
  const groups = new Map();
  for (const [path, methods] of Object.entries(document.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const tag = about.tags?.[0] ?? "Other";
      groups.set(tag, [...(groups.get(tag) ?? []), route(path, method, about)]);
    }
  }
  return html`<p>${document.info.summary} Everything below is also in <a href="openapi.json">/openapi.json</a>.</p>
    ${[...groups].map(([tag, routes]) => html`<h2>${tag}</h2>${routes}`)}`;
}

async function show() {
  try {
    render(page(await getJson("openapi.json")), main);
  } catch (error) {
    render(error.status === 401 ? needsKey() : html`<p class="warning" role="alert">${error.message}</p>`, main);
  }
}

function needsKey() {
  const take = (event) => {
    event.preventDefault();
    key.set(new FormData(event.target).get("key").trim());
    show();
  };
  return html`<form class="line" @submit=${take}>
    <label>This server needs an API key <input name="key" type="password" required autocomplete="off"></label>
    <button>Show the API</button>
  </form>`;
}

show();

// The view of requests: those that run, which can be stopped, and the last ones that ended.

import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { repeat } from "./vendor/lit-html/directives/repeat.js";
import { clock, iso, number, rate, seconds } from "./format.js";

const OUTCOMES = {
  running: "running",
  answered: "answered",
  left: "client left",
  stopped: "stopped here",
  refused: "refused",
  failed: "failed",
};

export function requestsView({ requests, busy }, actions) {
  const rows = [...requests.running, ...requests.ended];
  if (!rows.length) {
    return html`<h2>Requests</h2>
      <p class="hint">None yet. They are listed here with their times and tokens; their text is not kept.</p>`;
  }
  return html`<h2 id="requests-title">Requests</h2>
    <table aria-labelledby="requests-title" class="cards requests">
      <thead>
        <tr>
          <th scope="col">Time</th>
          <th scope="col">Client</th>
          <th scope="col">Model</th>
          <th scope="col" class="figure">Tokens in</th>
          <th scope="col" class="figure">of them cached</th>
          <th scope="col" class="figure">Tokens out</th>
          <th scope="col" class="figure">First token</th>
          <th scope="col" class="figure">Tokens/s</th>
          <th scope="col" class="figure">Took</th>
          <th scope="col">Outcome</th>
        </tr>
      </thead>
      <tbody>
        ${repeat(rows, (each) => each.id, (each) => row(each, busy, actions))}
      </tbody>
    </table>
    <p class="hint">The last ${requests.ended.length} that ended. Nothing of their text is kept.</p>`;
}

function row(each, busy, actions) {
  const name = `requests/${each.id}/stop`;
  const stop = html`<button
    type="button"
    aria-label="Stop the request to ${each.model}"
    ?disabled=${busy.has(name)}
    @click=${() => actions.act(name, name, {})}
  >Stop</button>`;
  const why = each.outcome === "running" ? each.note : each.reason;
  return html`<tr>
    <th scope="row" data-name="Time"><time datetime=${iso(each.started)}>${clock(each.started)}</time></th>
    <td data-name="Client">${each.client}</td>
    <td data-name="Model" class="id">${each.model}</td>
    <td data-name="Tokens in" class="figure">${number(each.tokens_in)}</td>
    <td data-name="of them cached" class="figure">${number(each.tokens_cached)}</td>
    <td data-name="Tokens out" class="figure">${number(each.tokens_out)}</td>
    <td data-name="First token" class="figure">${seconds(each.first_token_seconds)}</td>
    <td data-name="Tokens/s" class="figure">${rate(each.tokens_per_second)}</td>
    <td data-name="Took" class="figure">${seconds(each.seconds)}</td>
    <td data-name="Outcome">
      <span class="outcome ${each.outcome}">${OUTCOMES[each.outcome] ?? each.outcome}</span>
      ${why ? html`<span class="hint">${why}</span>` : nothing} ${each.outcome === "running" ? stop : nothing}
    </td>
  </tr>`;
}

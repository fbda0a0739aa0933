// A model's Markdown as elements of the page. What a model writes is never trusted: only formatting is let through.

import { marked } from "./vendor/marked/marked.esm.js";
import DOMPurify from "./vendor/dompurify/purify.es.js";

// No pictures: one that a model names would be fetched from a place of its choice.
const FORMATTING = [
  ..."a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s strong sub sup".split(" "),
  ..."table tbody td th thead tr ul".split(" "),
];
const SANITIZED = {
  ALLOWED_TAGS: FORMATTING,
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  RETURN_DOM_FRAGMENT: true,
};

/** Return a fragment that shows a text in Markdown. */
export function markdown(text) {
  const fragment = DOMPurify.sanitize(marked.parse(text, { gfm: true, breaks: true }), SANITIZED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of fragment.querySelectorAll("pre")) block.append(copyButton(() => block.firstChild.textContent));
  return fragment;
}

/** Return a button that copies a text, and says so. */
export function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy quiet";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy by hand"; // browsers allow it on https and localhost alone
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}

// The request of a chat as a program would send it.

const KEY = "MLX_OMNI_API_KEY";

/** Return the request as a shell command; `needsKey`: whether the server wants one, which is never written out. */
export function curl(url, body, needsKey) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", `'\\''`);
  const lines = [`curl ${url}/v1/chat/completions`, `-H 'Content-Type: application/json'`];
  if (needsKey) lines.push(`-H "Authorization: Bearer $${KEY}"`);
  return `${lines.join(" \\\n  ")} \\\n  -d '${data}'`;
}

/** Return the request as a Python program with OpenAI's package. */
export function python(url, body, needsKey) {
  const { model, messages, stream_options: _, stream: __, ...more } = body;
  const known = ["temperature", "top_p", "max_tokens", "seed"];
  const own = Object.entries(more).filter(([name]) => known.includes(name));
  const extra = Object.fromEntries(Object.entries(more).filter(([name]) => !known.includes(name)));
  const rows = [
    ["model", model],
    ["messages", messages],
    ...own,
    ...(Object.keys(extra).length ? [["extra_body", extra]] : []),
  ];
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${url}/v1", api_key=${needsKey ? `os.environ["${KEY}"]` : '"none"'})`,
    "chunks = client.chat.completions.create(",
    ...rows.map(([name, value]) => `    ${name}=${literal(value, 4)},`),
    "    stream=True,",
    ")",
    "for chunk in chunks:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

/** Return a value of JSON as Python writes it. */
function literal(value, indent) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inside = " ".repeat(indent + 4);
  const parts = Array.isArray(value)
    ? value.map((each) => literal(each, indent + 4))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? ["[", "]"] : ["{", "}"];
  const line = `${open}${parts.join(", ")}${close}`;
  if (line.length + indent < 100 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${inside}${part},\n`).join("")}${" ".repeat(indent)}${close}`;
}

// The console's page: asks the server that it came from, and nobody else. No library.
import { make } from "./elements.js";
import { checkProof } from "./proof.js";
import { showTrace } from "./trace.js";

const find = (id) => document.getElementById(id);
let secret = "";
let known = { sources: [], purposes: [] };
let running = null; // an AbortController

function complain(error) {
  const line = find("trouble");
  line.hidden = !error;
  line.textContent = error ? String(error.message ?? error) : "";
}

async function call(path, options = {}) {
  const headers = { ...(secret && { Authorization: `Bearer ${secret}` }), ...options.headers };
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  let said = `The server answered ${answer.status}.`;
  try { said = (await answer.json()).error.message; } catch { /* it said no more */ }
  throw new Error(said);
}

// --- who, what for, and which sources ---------------------------------------------------------

async function showSources() {
  const purpose = find("purpose").value;
  const query = purpose ? `?purpose=${encodeURIComponent(purpose)}` : "";
  known = await (await call(`/v1/sources${query}`)).json();
  const { subject, groups, roles } = known.principal;
  const belongs = [...groups.map((g) => `group ${g}`), ...roles.map((r) => `role ${r}`)];
  find("who").textContent = `You are ${subject}${belongs.length ? `: ${belongs.join(", ")}` : ""}.`;
  showPurposes(purpose);
  const unasked = new Set(
    [...document.querySelectorAll("#sources input:not(:checked)")].map((box) => box.value));
  find("sources").replaceChildren(...known.sources.map((source) => {
    const row = make("tr");
    const box = make("input");
    Object.assign(box, { type: "checkbox", value: source.name, id: `ask-${source.name}` });
    box.checked = !unasked.has(source.name);
    const label = make("label", source.name);
    label.htmlFor = box.id;
    const head = make("th");
    head.scope = "row";
    const name = make("div", "", "row");
    name.append(box, label);
    head.append(name);
    const verdict = make("td", source.is_enabled ? "yes" : "no", source.is_enabled ? "yes" : "no");
    row.append(head, make("td", source.owner), make("td", source.licence), verdict,
      make("td", source.reasons.join("; ")));
    return row;
  }));
  const chosen = find("without").value;
  find("without").replaceChildren(make("option", "nothing beside it"),
    ...known.sources.map((source) => make("option", source.name)));
  find("without").options[0].value = "";
  if (known.sources.some((source) => source.name === chosen)) find("without").value = chosen;
  find("tracing").hidden = !traceable().length;
  find("trace-note").textContent =
    `Looks the answer up in the training text of ${traceable().join(", ")}, as far as they take part.`;
}

const traceable = () =>
  known.sources.filter((source) => source.is_traceable).map((source) => source.name);

function showPurposes(chosen) {
  const list = find("purpose");
  list.replaceChildren(make("option", "none stated"),
    ...known.purposes.map((purpose) => make("option", purpose.name)));
  list.options[0].value = "";
  list.value = chosen;
  const found = known.purposes.find((purpose) => purpose.name === chosen);
  find("purpose-note").textContent = found ? `${found.meaning} (${found.source})`
    : "Only sources whose owners permit any purpose take part.";
}

// --- asking -----------------------------------------------------------------------------------

const asked = () =>
  [...document.querySelectorAll("#sources input:checked")].map((box) => box.value);

async function write(side, only, signal) {
  const answer = side.querySelector(".answer");
  const facts = side.querySelector(".facts");
  const prompt = find("prompt").value;
  answer.replaceChildren(make("span", prompt, "asked"));
  facts.replaceChildren();
  const body = {
    model: known.model, prompt, stream: true, stream_options: { include_usage: true },
    max_tokens: Number(find("most").value), temperature: Number(find("temperature").value),
    experts: { only },
  };
  if (find("purpose").value) body.purpose = find("purpose").value;
  if (find("trace").checked && traceable().length) body.trace = true;
  const lookable = traceable();
  let text = "";
  const reply = await call("/v1/completions", {
    method: "POST", signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
  });
  for await (const event of events(reply.body)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      answer.append(choice.text);
      text += choice.text;
    }
    if (!event.flexolmo) continue;
    showFacts(facts, event.flexolmo);
    for (const trace of event.flexolmo.traces ?? []) {
      const looked = event.flexolmo.enabled.filter((n) => lookable.includes(n) && !trace.untraced[n]);
      showTrace(side, prompt, text, trace, looked);
    }
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data: ") ? part.slice(6) : "[DONE]"; // or a comment
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function showFacts(facts, told) {
  facts.replaceChildren(
    make("p", `Took part: ${["public", ...told.enabled].join(", ")}.`),
    make("p", `Entry ${told.entry} of the audit log.`),
    ...Object.entries(told.refused).map(([n, why]) => make("p", `Not ${n}: ${why.join("; ")}.`)),
    ...Object.entries(told.attributions).map(([n, line]) => make("p", `${n}: ${line}`)));
  for (const [name, share] of Object.entries(told.shares ?? {})) {
    const line = make("div", "", "share");
    const bar = make("progress");
    Object.assign(bar, { max: 1, value: share });
    bar.setAttribute("aria-label", `share of ${name}`);
    line.append(make("span", name), bar, make("span", `${(100 * share).toFixed(1)} %`));
    facts.append(line);
  }
}

async function ask(event) {
  event.preventDefault();
  complain();
  running = new AbortController();
  find("go").disabled = true;
  find("stop").disabled = false;
  const without = find("without").value;
  const sides = [write(find("left"), asked(), running.signal)];
  find("right").hidden = !without;
  if (without) {
    find("right-title").textContent = `Without ${without}`;
    sides.push(write(find("right"), asked().filter((n) => n !== without), running.signal));
  }
  const ends = await Promise.allSettled(sides);
  const failed = ends.find((end) => end.status === "rejected" && end.reason.name !== "AbortError");
  complain(failed?.reason);
  find("go").disabled = false;
  find("stop").disabled = true;
}

// --- the audit log ----------------------------------------------------------------------------

async function showTrail() {
  const { entries } = await (await call("/v1/decisions")).json();
  find("trail").replaceChildren(...entries.map((entry) => {
    const row = make("tr");
    const head = make("th", String(entry.number));
    head.scope = "row";
    const proof = make("td");
    const button = make("button", "Prove");
    button.type = "button";
    button.setAttribute("aria-label", `Prove entry ${entry.number}`);
    button.addEventListener("click", () => prove(entry.number, proof));
    proof.append(button);
    const { fields } = entry;
    row.append(head, make("td", entry.time.replace("T", " ").slice(0, 19)),
      make("td", fields.purposes.join(", ") || "none stated"),
      make("td", fields.enabled.join(", ") || "none"),
      make("td", Object.keys(fields.refused).join(", ") || "none"), proof);
    return row;
  }));
}

async function prove(number, cell) {
  try {
    const answer = await (await call(`/v1/decisions/${number}/proof`)).json();
    const head = await checkProof(answer.proof, answer.public_key);
    cell.replaceChildren(make("span", "✓ in the log", "yes"),
      make("div", `of ${head.size} entries, signed ${head.time.slice(0, 19)} by ${head.keyId}`,
        "note"));
  } catch (error) {
    cell.replaceChildren(make("span", "✗ not proven", "no"), make("div", error.message, "note"));
  }
}

// --- wiring -----------------------------------------------------------------------------------

const trying = (act) => async (event) => {
  event?.preventDefault();
  complain();
  try { await act(); } catch (error) { complain(error); }
};

find("identity").addEventListener("submit", trying(async () => {
  secret = find("secret").value.trim();
  await showSources();
}));
find("purpose").addEventListener("change", trying(showSources));
find("ask").addEventListener("submit", ask);
find("stop").addEventListener("click", () => running?.abort());
find("refresh").addEventListener("click", trying(showTrail));
find("right").hidden = true;
trying(showSources)();

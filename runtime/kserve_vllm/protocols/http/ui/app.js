// The page of kserve-vllm. It asks /v2/health/ready and /metrics of the port that it came from, and the public API there
// with the visitor's own key, which stays in this page's memory. Whatever comes from the server is shown as text.
"use strict";

const EVERY_MS = 2000;
const KEEP = 90;
const OWN = "kserve_vllm_";
const at = (id) => document.getElementById(id);

// ---- live figures

function samples(text) {
  const found = new Map();
  const line = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/gm;
  for (const [, name, labels, value] of text.matchAll(line)) {
    const own = {};
    for (const [, key, raw] of (labels || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) own[key] = raw.replace(/\\(["\\])/g, "$1");
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels: own, id: labels || "", value: Number(value) });
  }
  return found;
}

const sum = (page, name) => {
  const rows = page.get(name);
  return rows ? rows.reduce((all, row) => all + row.value, 0) : null;
};

// How much each sample of a counter has grown; one that fell began anew.
function grown(before, after, name) {
  const old = new Map((before.get(name) || []).map((row) => [row.id, row.value]));
  return (after.get(name) || []).map((row) => {
    const was = old.get(row.id) || 0;
    return { labels: row.labels, value: row.value >= was ? row.value - was : row.value };
  });
}

const total = (rows) => rows.reduce((all, row) => all + row.value, 0);

// As Prometheus' histogram_quantile: between the bounds of the bucket that holds it.
function quantile(before, after, name, share) {
  const upTo = new Map();
  for (const row of grown(before, after, name + "_bucket")) {
    const bound = row.labels.le === "+Inf" ? Infinity : Number(row.labels.le);
    upTo.set(bound, (upTo.get(bound) || 0) + row.value);
  }
  const bounds = [...upTo.keys()].sort((a, b) => a - b);
  const all = bounds.length ? upTo.get(bounds[bounds.length - 1]) : 0;
  if (!all) return null;
  let low = 0, below = 0;
  for (const bound of bounds) {
    const here = upTo.get(bound);
    if (here >= share * all) return bound === Infinity ? low : low + (bound - low) * (share * all - below) / Math.max(here - below, 1e-9);
    low = bound;
    below = here;
  }
  return low;
}

const number = (value) => (value === null ? "-" : value >= 100 ? Math.round(value).toLocaleString("en") : String(Math.round(value * 10) / 10));
const percent = (value) => (value === null ? "-" : Math.round(value * 100) + " %");
const time = (value) => (value === null ? "-" : value < 1 ? Math.round(value * 1000) + " ms" : value.toFixed(2) + " s");

const TILES = [
  { id: "output", title: "tokens written a second", show: number },
  { id: "running", title: "requests running", show: number },
  { id: "waiting", title: "requests waiting", show: number },
  { id: "requests", title: "requests a second", show: number },
  { id: "first", title: "first token, p95", show: time },
  { id: "gap", title: "gap between tokens, p95", show: time },
  { id: "cache", title: "KV cache in use", show: percent, top: 1 },
  { id: "prefix", title: "prompt tokens from the prefix cache", show: percent, top: 1 },
];

function figures(before, after, seconds) {
  const counted = (name) => total(grown(before, after, OWN + name));
  const prompt = counted("prompt_tokens_total");
  const inFront = sum(after, OWN + "waiting_requests") || 0;
  const caches = after.get("vllm:kv_cache_usage_perc");
  return {
    output: counted("output_tokens_total") / seconds,
    running: sum(after, "vllm:num_requests_running"),
    waiting: (sum(after, "vllm:num_requests_waiting") || 0) + inFront,
    requests: counted("requests_total") / seconds,
    first: quantile(before, after, OWN + "time_to_first_token_seconds", 0.95),
    gap: quantile(before, after, OWN + "inter_token_latency_seconds", 0.95),
    cache: caches ? total(caches) / caches.length : null,
    prefix: prompt ? counted("cached_prompt_tokens_total") / prompt : null,
  };
}

const history = new Map(TILES.map((tile) => [tile.id, []]));

function buildTiles() {
  for (const tile of TILES) {
    const box = document.createElement("div");
    box.className = "tile";
    const title = document.createElement("span");
    title.textContent = tile.title;
    const value = document.createElement("b");
    value.id = "tile-" + tile.id;
    value.textContent = "-";
    const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    picture.setAttribute("viewBox", `0 0 ${KEEP - 1} 40`);
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", tile.title + " over the last minutes");
    picture.append(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
    box.append(title, value, picture);
    at("tiles").append(box);
  }
}

function draw(found) {
  for (const tile of TILES) {
    const past = history.get(tile.id);
    past.push(found[tile.id]);
    if (past.length > KEEP) past.shift();
    const value = at("tile-" + tile.id);
    value.textContent = tile.show(found[tile.id]);
    const top = tile.top || Math.max(1e-9, ...past.map((each) => each || 0));
    const from = KEEP - past.length;
    const points = past.map((each, i) => `${from + i},${(38 - 36 * Math.min(1, (each || 0) / top)).toFixed(1)}`);
    value.parentNode.querySelector("polyline").setAttribute("points", points.join(" "));
  }
}

function list(id, rates) {
  const rows = [...rates].filter(([, rate]) => rate > 0).sort((a, b) => b[1] - a[1]).slice(0, 8);
  at(id).hidden = rows.length === 0;
  at(id).tBodies[0].replaceChildren(...rows.map(([name, rate]) => {
    const row = document.createElement("tr");
    for (const text of [name || "-", number(rate) + " tokens/s"]) row.insertCell().textContent = text;
    return row;
  }));
}

function byLabel(before, after, seconds, label) {
  const rates = new Map();
  for (const word of ["prompt", "output"]) {
    for (const row of grown(before, after, `${OWN}${word}_tokens_total`)) {
      const name = row.labels[label] || "";
      rates.set(name, (rates.get(name) || 0) + row.value / seconds);
    }
  }
  return rates;
}

let last = null, listed = false;

async function look() {
  const state = at("state"), trouble = at("trouble");
  try {
    const health = await (await fetch("/v2/health/ready", { cache: "no-store" })).json();
    state.textContent = `${health.state} for ${Math.round(health.seconds)} s${health.reason ? ": " + health.reason : ""}`;
    state.className = health.ready ? "ready" : "bad";
    if (health.ready && !listed) { listed = true; await models(); }
    const answer = await fetch("/metrics", { cache: "no-store" });
    if (!answer.ok) throw new Error(`/metrics answers ${answer.status}`);
    const page = samples(await answer.text()), now = performance.now();
    if (last) {
      const seconds = (now - last.now) / 1000;
      draw(figures(last.page, page, seconds));
      list("tenants", byLabel(last.page, page, seconds, "tenant"));
      list("adapters", byLabel(last.page, page, seconds, "adapter"));
    }
    last = { page, now };
    trouble.hidden = true;
  } catch (error) {
    trouble.textContent = "No figures: " + error.message;
    trouble.hidden = false;
    if (error instanceof TypeError) { state.textContent = "the server does not answer"; state.className = "bad"; }
  }
  setTimeout(look, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}

// ---- chat

const headers = () => (at("key").value ? { authorization: "Bearer " + at("key").value } : {});

async function problem(answer) {
  try {
    const tree = await answer.json();
    return `${answer.status}: ${tree.error?.message || tree.error || tree.message || "refused"}`;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

function options(select, names) {
  const chosen = select.value;
  select.replaceChildren(...names.map(([value, text]) => new Option(text, value)));
  if (names.some(([value]) => value === chosen)) select.value = chosen;
}

let known = [];

async function models() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (!answer.ok) {
    at("speed").textContent = "The models can't be listed (" + await problem(answer) + ")";
    return;
  }
  at("speed").textContent = "";
  known = (await answer.json()).data;
  options(at("model"), known.filter((each) => !each.parent).map((each) => [each.id, each.id]));
  adapters();
}

function adapters() {
  const root = known.find((each) => each.id === at("model").value);
  const own = known.filter((each) => each.parent && (each.parent === root?.id || each.parent === root?.root || known.filter((e) => !e.parent).length === 1));
  options(at("adapter"), [["", "none"], ...own.map((each) => [each.id, each.id])]);
}

const turns = [];
let asking = null;

function show(role, text) {
  const turn = document.createElement("div");
  turn.className = "turn " + role;
  turn.textContent = text;
  at("talk").append(turn);
  at("talk").scrollTop = at("talk").scrollHeight;
  return turn;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function ask(text) {
  turns.push({ role: "user", content: text });
  show("user", text);
  const turn = show("assistant", "");
  asking = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  const began = performance.now();
  let first = null, written = "", used = null;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      signal: asking.signal,
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify({
        model: at("adapter").value || at("model").value,
        messages: turns,
        max_tokens: Number(at("tokens").value) || 256,
        temperature: Number(at("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!answer.ok) throw new Error(await problem(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message || "the stream broke off");
      used = event.usage || used;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first ??= performance.now() - began;
      written += piece;
      turn.textContent = written;
      at("talk").scrollTop = at("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") { turn.classList.add("error"); turn.textContent = written + (written ? "\n" : "") + error.message; }
  } finally {
    asking = null;
    at("send").disabled = false;
    at("stop").disabled = true;
  }
  if (written) turns.push({ role: "assistant", content: written });
  else turns.pop();
  if (first !== null) {
    const seconds = (performance.now() - began) / 1000, tokens = used?.completion_tokens;
    at("speed").textContent = `first token after ${time(first / 1000)}` + (tokens ? `, ${tokens} tokens in ${seconds.toFixed(1)} s` : "");
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (!text || asking) return;
  at("prompt").value = "";
  ask(text);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
});
at("stop").addEventListener("click", () => asking?.abort());
at("forget").addEventListener("click", () => { asking?.abort(); turns.length = 0; at("talk").replaceChildren(); at("speed").textContent = ""; });
at("model").addEventListener("change", adapters);
at("key").addEventListener("change", models);
at("settings").addEventListener("submit", (event) => event.preventDefault());

buildTiles();
look();

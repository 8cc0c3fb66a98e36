// The operator's page: one stream of events in, one canvas, a few buttons. No library, no request to anywhere else.
"use strict";

const RATES = [0, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5];
const LAST = 200; // parts in the chart and the preview
const HOLD = 90000; // milliseconds until a part that is held gives way to the live one
const QUIET = 6000; // milliseconds without an event before what is shown counts as old

const $ = (id) => document.getElementById(id);
const page = { me: null, state: null, parts: [], station: null, held: null, shown: null, layer: "overlay", wanted: null,
  heard: 0, drawn: "", pictured: null, drawing: false, preview: 0, bundleOf: "" };

async function ask(path, body) {
  const options = body === undefined ? {} :
    { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const data = await answer.json();
  if (answer.status === 401 && path !== "/v1/login") login();
  if (!answer.ok) throw new Error([data.what, data.why, data.cure].filter(Boolean).join(" "));
  return data;
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
  clearTimeout(say.timer);
  if (text) say.timer = setTimeout(() => say(""), 8000);
}

const guarded = (work) => async (event) => {
  try { await work(event); } catch (error) { say(error.message); }
};

function make(kind, text, className) {
  const found = document.createElement(kind);
  if (text !== undefined) found.textContent = text;
  if (className) found.className = className;
  return found;
}

const mine = () => page.parts.filter((part) => part.station === page.station);
const number = (value) => value === null ? "–" : Number(value.toPrecision(4)).toString();
const percent = (rate) => `${Number((100 * rate).toPrecision(3))} %`;
const station = () => page.state && page.state.stations.find((item) => item.name === page.station);

// --- the part that is shown ---

function live() {
  const found = mine();
  return found.length ? found[found.length - 1] : null;
}

function current() {
  return page.held ? page.parts.find((part) => part.key === page.held.key) || page.held : live();
}

function hold(part) {
  page.held = part;
  page.until = Date.now() + HOLD;
  showPart();
}

function showPart() {
  const part = current();
  page.shown = part;
  const said = part && part.override;
  const verdict = part ? part.verdict : "none";
  $("verdict").dataset.verdict = verdict;
  $("word").textContent = part ? verdict : "–";
  $("part").textContent = part ? part.part_id : "no part yet";
  $("score").textContent = part && part.score !== null ? `score ${number(part.score)}, limit ${number(part.threshold)}` : "";
  $("why").textContent = part && part.reason !== "score" ? part.reason : "";
  const newest = live();
  $("live").textContent = page.held ? `HELD \u00b7 live: ${newest ? newest.verdict : "\u2013"}` : "";
  $("view").classList.toggle("held", Boolean(page.held));
  $("hold").textContent = page.held ? "Back to live" : "Hold";
  $("hold").disabled = !part;
  $("override").hidden = !page.held || Boolean(said);
  if (part) {
    const to = part.verdict === "OK" ? "NG" : "OK";
    $("override").dataset.to = to;
    $("override").textContent = `This part is ${to}`;
  }
  $("undo").hidden = !said;
  $("said").textContent = said ? `${said.who} says ${said.verdict}` : "";
  draw();
}

const wanted = () => page.shown ? `${page.layer} ${page.shown.key}` : "";
// Numbers begin again with the service: with the key, the answer is this part's picture or none.
const picture = (part, more) => `/v1/parts/${part.number}/picture?${new URLSearchParams({ key: part.key, ...more })}`;

function fits(part) { // beside the verdict: the part's own frame; of the live parts, the one before until the next is there
  const shown = page.shown;
  return Boolean(part && shown && (part.key === shown.key || !page.held && part.station === shown.station));
}

function clear() { // an older frame beside this verdict would be the wrong one
  $("frame").getContext("2d").clearRect(0, 0, $("frame").width, $("frame").height);
  delete $("frame").dataset.key;
  page.pictured = null;
  page.drawn = "";
}

function draw() {
  const part = page.shown, key = wanted();
  if (!fits(page.pictured)) clear();
  if (!part || page.drawing || key === page.drawn) return;
  page.drawing = true;
  const found = new Image();
  found.onload = () => {
    page.drawing = false;
    if (fits(part)) {
      const canvas = $("frame");
      canvas.width = found.naturalWidth < 480 ? 3 * found.naturalWidth : found.naturalWidth;
      canvas.height = Math.round(canvas.width * found.naturalHeight / found.naturalWidth);
      const pen = canvas.getContext("2d");
      pen.imageSmoothingEnabled = found.naturalWidth >= 480;
      pen.drawImage(found, 0, 0, canvas.width, canvas.height);
      canvas.dataset.key = part.key;
      page.pictured = part;
      page.drawn = key;
    }
    if (key !== wanted()) draw();
  };
  found.onerror = () => { // tried again with the next event
    page.drawing = false;
    clear();
    if (key !== wanted()) draw();
  };
  found.src = picture(part, { layer: page.layer, size: 1280 });
}

function showStrip() {
  const bad = mine().filter((part) => part.verdict === "NG").slice(-6).reverse();
  const key = bad.map((part) => `${part.key}${part.override ? " said" : ""}`).join("\n");
  if ($("strip").dataset.key === key) return;
  $("strip").dataset.key = key;
  $("strip").replaceChildren(...bad.map((part) => {
    const button = make("button", undefined, part.override ? "said" : "");
    button.type = "button";
    const small = make("img");
    small.alt = "";
    small.src = picture(part, { size: 240 });
    button.append(small, make("span", part.part_id));
    button.title = part.part_id;
    button.onclick = () => hold(part);
    return button;
  }));
  if (!bad.length) $("strip").append(make("span", "none yet"));
}

// --- scores ---

function showChart() {
  const parts = mine().filter((part) => part.score !== null).slice(-LAST);
  const limit = parts.length ? parts[parts.length - 1].threshold : null;
  const top = Math.max(...parts.map((part) => part.score), (limit || 0) * 1.6, (page.wanted && page.wanted.wanted) || 0, 1e-9) * 1.08;
  const y = (score) => 165 - 160 * Math.max(score, 0) / top;
  const shape = (kind, values) => {
    const found = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(values)) found.setAttribute(name, value);
    return found;
  };
  const shapes = parts.map((part, index) => shape("rect", { class: part.verdict, x: 3 * (LAST - parts.length + index), width: 2.4,
    y: Math.min(y(part.score), 163), height: Math.max(165 - y(part.score), 2) }));
  const rule = (name, score) => shapes.push(shape("line", { class: name, x1: 0, x2: 600, y1: y(score), y2: y(score) }));
  if (limit !== null) rule("limit", limit);
  if (page.wanted) rule("wanted", page.wanted.wanted);
  $("chart").replaceChildren(...shapes);
  $("limit").textContent = limit === null ? "" : `limit ${number(limit)}`;
}

async function preview() {
  const place = ++page.preview;
  const rate = RATES[$("slider").value];
  $("chosen").textContent = percent(rate);
  const query = new URLSearchParams({ recipe: station().recipe, false_alarms: rate, last: LAST });
  const found = await ask(`/v1/threshold?${query}`);
  if (place !== page.preview) return; // the slider has moved on
  page.wanted = { ...found, rate };
  $("preview").textContent = found.judged ?
    `Limit ${number(found.threshold)} → ${number(found.wanted)}. Of the last ${found.judged} parts ` +
    `${found.ng} were above it, ${found.would_be_ng} would be; ${found.changed.length} would change.` :
    `Limit ${number(found.threshold)} → ${number(found.wanted)}. No part was judged with this bundle yet.`;
  $("apply").disabled = !may("engineer");
  $("cancel").disabled = false;
  showChart();
}

async function resetSlider() {
  const recipe = station() && station().recipe;
  if (!recipe) return;
  page.preview += 1;
  page.wanted = null;
  const found = await ask(`/v1/threshold?${new URLSearchParams({ recipe, last: LAST })}`);
  const rate = found.false_alarms === null ? found.default_false_alarms : found.false_alarms;
  const near = RATES.reduce((best, value, index) => Math.abs(value - rate) < Math.abs(RATES[best] - rate) ? index : best, 0);
  $("slider").value = near;
  $("chosen").textContent = percent(rate);
  $("preview").textContent = "Move the slider to see what the latest parts would have got.";
  $("apply").disabled = $("cancel").disabled = true;
  showChart();
}

// --- everything else ---

const may = (role) => page.me && (page.me.role === "engineer" || page.me.role === role);

function showState() {
  const state = page.state, here = station();
  if (!here) return;
  $("line").textContent = state.line;
  document.title = `${state.line} · ${here.name}`;
  const names = state.stations.map((item) => item.name).join();
  if ($("stations").dataset.key !== `${names}/${page.station}`) {
    $("stations").dataset.key = `${names}/${page.station}`;
    $("stations").replaceChildren(...state.stations.map((item) => {
      const button = make("button", item.name);
      button.type = "button";
      button.setAttribute("aria-current", item.name === page.station);
      button.onclick = guarded(async () => { page.station = item.name; page.held = null; showAll(); await resetSlider(); });
      return button;
    }));
  }
  if ($("recipe").dataset.key !== `${here.name}/${here.recipes}`) {
    $("recipe").dataset.key = `${here.name}/${here.recipes}`;
    $("recipe").replaceChildren(...here.recipes.map((name) => make("option", name)));
  }
  if (document.activeElement !== $("recipe")) $("recipe").value = here.recipe;
  if (page.bundleOf !== here.recipe) guarded(showBundles)();
  const recipe = state.recipes[here.recipe];
  const facts = [];
  const fact = (kind, text) => { const item = make("li", text, kind); facts.push(item); };
  fact(here.camera_connected ? "" : "bad", here.camera_connected ? "camera connected" : "camera disconnected");
  if (here.finished) fact("warn", "no more frames");
  else fact(here.ready && here.live ? "" : "bad", here.fault || (here.ready && here.live ? "judging" : "verdicts are overdue"));
  if (here.latency_ms.p50 !== undefined) fact("", `${number(here.latency_ms.p50)} ms, 99 % within ${number(here.latency_ms.p99)} ms`);
  const failed = here.counts.timeout + here.counts.error;
  fact(failed ? "warn" : "", `${failed} not judged (NG), ${here.counts.missed} of them not taken, ${here.counts.dropped} dropped`);
  for (const sink of state.sinks) {
    const gone = ["lost", "refused"].filter((key) => sink[key]).map((key) => `, ${sink[key]} ${key}`).join("");
    fact(sink.working ? gone ? "warn" : "" : "bad", `${sink.name}: ${sink.working ? "" : "fails, "}${sink.backlog} wait${gone}`);
  }
  for (const item of state.drift) fact("bad", `drift, ${item.recipe}: ${item.words}`);
  if (recipe) fact("", `${recipe.backend}`);
  if (here.last_error) fact("warn", here.last_error);
  $("facts").replaceChildren(...facts);
  const bad = !state.ready || !state.live, warn = state.drift.length || state.sinks.some((sink) => !sink.working);
  $("health").textContent = bad ? "not ready" : warn ? "look at health" : "ready";
  $("health").className = `pill ${bad ? "bad" : warn ? "warn" : "good"}`;
  $("since").textContent = `since ${state.counters.since.replace("T", " ")}`;
  $("rows").replaceChildren(...state.counters.rows.filter((row) => row.station === page.station).map((row) => {
    const line = make("tr");
    line.append(make("td", row.recipe || "none"), make("td", row.OK), make("td", row.NG), make("td", percent(row.NG / (row.OK + row.NG))));
    return line;
  }));
  for (const id of ["use", "try", "write"]) $(id).disabled = !may("engineer");
}

async function showBundles() {
  const recipe = station().recipe;
  page.bundleOf = recipe;
  const found = await ask(`/v1/bundle?${new URLSearchParams({ recipe })}`);
  $("bundle").replaceChildren(...found.versions.map((name) => make("option", name)));
  $("bundle").value = found.bundle;
  $("pool").textContent = `In use: ${found.bundle}. Confirmed by people: ${found.pool.good} good, ${found.pool.bad} bad.`;
}

async function follow() {
  const job = await ask("/v1/recalibration");
  if (job.state === "running") {
    $("job").textContent = "Computing new thresholds …";
    setTimeout(guarded(follow), 1000);
  } else if (job.state === "failed") {
    $("job").textContent = [job.what, job.why, job.cure].filter(Boolean).join(" ");
  } else if (job.state === "done") {
    $("job").textContent = `Limit ${number(job.before)} → ${number(job.after)} from ${job.pictures} images; ${job.changes} of the ` +
      `last ${job.judged} parts would change. ${job.written ? `Written: ${job.written}.` : "Nothing was written."}`;
    await showBundles();
  }
}

const recalibrate = (dry) => guarded(async () => {
  await ask("/v1/recalibration", { recipe: station().recipe, dry_run: dry });
  await follow();
});

function showAll() {
  showState();
  showPart();
  showStrip();
  showChart();
}

function heard() {
  page.heard = Date.now();
  $("lost").hidden = true;
  $("verdict").classList.remove("old");
}

function take(parts) {
  const known = new Map(page.parts.map((part) => [part.key, part]));
  for (const part of parts) known.set(part.key, part);
  page.parts = [...known.values()].sort((one, other) => one.number - other.number).slice(-2000);
}

async function reload() {
  page.parts = [];
  take(await ask(`/v1/parts?last=1000`));
  showAll();
}

function login() {
  if (!$("login").open) $("login").showModal();
}

function listen() {
  const events = new EventSource("/v1/events");
  events.onopen = guarded(async () => { heard(); await reload(); });
  events.addEventListener("state", guarded(async (event) => {
    heard();
    const first = page.state === null, before = station() && station().recipe;
    page.state = JSON.parse(event.data);
    if (!station()) page.station = page.state.stations[0].name;
    if (first) showAll(); else showState();
    if (before !== station().recipe) await resetSlider();
  }));
  events.addEventListener("parts", (event) => { heard(); take(JSON.parse(event.data)); showPart(); showStrip(); showChart(); });
  events.onerror = () => { if (events.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 3000); };
}

async function begin() {
  page.me = await ask("/v1/me");
  if (page.me.needs_token && !page.me.name) { login(); return; }
  $("user").textContent = page.me.name === "local" ? "" : `${page.me.name} (${page.me.role})`;
  listen();
}

$("hold").onclick = () => hold(page.held ? null : page.shown);
$("heat").onclick = () => {
  page.layer = page.layer === "overlay" ? "frame" : "overlay";
  $("heat").setAttribute("aria-pressed", page.layer === "overlay");
  draw();
};
$("override").onclick = guarded(async () => {
  const part = page.held;
  await ask("/v1/overrides", { key: part.key, verdict: part.verdict === "OK" ? "NG" : "OK" });
  await reload();
  page.bundleOf = "";
});
$("undo").onclick = guarded(async () => { await ask("/v1/overrides/undo", { key: page.shown.key }); await reload(); page.bundleOf = ""; });
$("slider").oninput = guarded(preview);
$("cancel").onclick = guarded(resetSlider);
$("apply").onclick = guarded(async () => {
  const found = page.wanted;
  const made = await ask("/v1/threshold", { recipe: found.recipe, false_alarms: found.rate, version: found.version });
  await resetSlider();
  say(`The limit of ${made.recipe} is ${number(made.threshold)} now.`);
});
$("recipe").onchange = guarded(async () => {
  try {
    await ask("/v1/recipe", { station: page.station, recipe: $("recipe").value });
    say(`${page.station} uses ${$("recipe").value} now.`);
  } finally { $("recipe").blur(); }
});
$("use").onclick = guarded(async () => {
  const made = await ask("/v1/bundle", { recipe: station().recipe, bundle: $("bundle").value });
  say(`${made.recipe} uses ${made.bundle} now, limit ${number(made.threshold)}.`);
  await showBundles();
  await resetSlider();
});
$("try").onclick = recalibrate(true);
$("write").onclick = recalibrate(false);
$("entry").onsubmit = async (event) => {
  event.preventDefault();
  try {
    await ask("/v1/login", { token: $("token").value });
    location.reload();
  } catch (error) { $("refused").textContent = error.message; }
};
setInterval(() => {
  if (page.held && Date.now() > page.until) hold(null);
  if (Date.now() - page.heard > QUIET && page.me && page.me.name) {
    $("lost").hidden = false;
    $("verdict").classList.add("old"); // an old verdict never looks like a new one
  }
}, 1000);
guarded(begin)();

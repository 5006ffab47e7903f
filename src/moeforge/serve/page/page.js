"use strict";
// What the model writes enters the page as text nodes only, never as HTML.

const $ = (id) => document.getElementById(id);
const POINTS = 90;
const POLL_MS = 1000;

// ---- live numbers

const series = { rate: [], running: [], waiting: [], cache: [] };
let before = null;

function push(list, value) {
  list.push(value);
  if (list.length > POINTS) list.shift();
}

function shape(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function draw(id, lines, most) {
  const width = 240, height = 56;
  const top = Math.max(most || 0, ...lines.flat(), 1e-9);
  const at = (list) => list.map((value, i) => {
    const x = width - (list.length - 1 - i) * (width / (POINTS - 1));
    return `${x.toFixed(1)},${(height - 1 - (value / top) * (height - 4)).toFixed(1)}`;
  });
  const nodes = [shape("line", { x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 })];
  lines.forEach((list, i) => {
    const points = at(list);
    if (i === 0 && points.length > 1) {
      const first = points[0].split(",")[0];
      nodes.push(shape("polygon", { points: `${first},${height} ${points.join(" ")} ${width},${height}` }));
    }
    nodes.push(shape("polyline", { points: points.join(" "), class: i === 0 ? "first" : "second" }));
  });
  $(id).replaceChildren(...nodes);
}

function number(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

function show(stats, now) {
  $("model").textContent = stats.model;
  document.title = `${stats.model} · moeforge`;
  $("max-tokens").max = stats.max_model_len - 1;
  health(stats.trouble ? "bad" : "good", stats.trouble || "ready");
  if (before) {
    const seconds = Math.max(now - before.now, 1) / 1000;
    push(series.rate, Math.max(0, stats.generation_tokens - before.stats.generation_tokens) / seconds);
  }
  before = { stats, now };
  push(series.running, stats.num_requests_running);
  push(series.waiting, stats.num_requests_waiting);
  push(series.cache, stats.kv_cache_usage);

  $("rate-value").textContent = series.rate.length ? number(series.rate.at(-1)) : "–";
  $("rate-note").textContent = `${stats.generation_tokens.toLocaleString("en")} tokens so far`;
  $("queue-value").textContent = stats.num_requests_running;
  $("queue-note").textContent = `${stats.num_requests_waiting} waiting`;
  $("cache-value").textContent = `${(100 * stats.kv_cache_usage).toFixed(stats.kv_cache_usage < 0.1 ? 1 : 0)} %`;
  const hits = stats.prefix_cache_queries ? stats.prefix_cache_hits / stats.prefix_cache_queries : 0;
  $("cache-note").textContent = `${Math.round(100 * hits)} % of prompt tokens were cached`;
  draw("rate", [series.rate]);
  draw("queue", [series.running, series.waiting]);
  draw("cache", [series.cache], 1);
}

function health(kind, text) {
  $("health").className = `health ${kind}`;
  $("health").textContent = text;
}

async function poll() {
  if (!document.hidden) {
    try {
      const reply = await fetch("/stats", { cache: "no-store" });
      if (!reply.ok) throw new Error(`the server answers ${reply.status}`);
      show(await reply.json(), performance.now());
    } catch (error) {
      health("bad", error instanceof TypeError ? "the server is not reachable" : error.message);
    }
  }
  setTimeout(poll, POLL_MS);
}

// ---- chat

let conversation = [];
let running = null; // the AbortController of the answer that is being written

function scroller() {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  return () => { if (atEnd) log.scrollTop = log.scrollHeight; };
}

function addTurn(role, text) {
  $("empty").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const body = document.createElement("div");
  body.className = "text";
  body.textContent = text;
  turn.append(body);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return { turn, body };
}

function addNote(turn, text, bad) {
  const note = document.createElement("p");
  note.className = bad ? "note bad" : "note";
  note.textContent = text;
  const follow = scroller();
  turn.append(note);
  follow();
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  const most = Math.floor(Number($("max-tokens").value));
  if (most > 0) body.max_tokens = most;
  return body;
}

async function send(question) {
  conversation.push({ role: "user", content: question });
  addTurn("user", question);
  const { turn, body } = addTurn("assistant", "");
  turn.classList.add("running");
  setRunning(new AbortController());
  const begin = performance.now();
  let answer = "", first = 0, usage = null, reason = null, failure = null;
  let written = 0, frame = 0;
  const text = body.appendChild(document.createTextNode(""));
  const write = () => { // once a frame, however fast tokens come
    const follow = scroller();
    text.appendData(answer.slice(written));
    written = answer.length;
    frame = 0;
    follow();
  };
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(requestBody()),
      signal: running.signal,
    });
    if (!reply.ok) {
      const said = await reply.json().catch(() => null);
      throw new Error(said?.error?.message || `the server answers ${reply.status}`);
    }
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      if (!choice.delta.content) continue;
      first = first || performance.now();
      answer += choice.delta.content;
      frame = frame || requestAnimationFrame(write);
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else failure = error instanceof TypeError ? "the connection to the server is lost" : error.message;
  }
  cancelAnimationFrame(frame);
  write();
  turn.classList.remove("running");
  setRunning(null);
  if (answer) conversation.push({ role: "assistant", content: answer });
  else conversation.pop(); // the question was not answered: it may be asked again
  if (failure) addNote(turn, failure, true);
  else addNote(turn, summary(usage, reason, begin, first), false);
}

function summary(usage, reason, begin, first) {
  const parts = [];
  const seconds = (performance.now() - first) / 1000;
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && first && usage.completion_tokens > 1) {
    parts.push(`${number((usage.completion_tokens - 1) / Math.max(seconds, 0.001))} a second`);
  }
  if (first) parts.push(`first after ${((first - begin) / 1000).toFixed(2)} s`);
  if (reason === "length") parts.push("cut at its most tokens");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("reset").disabled = controller !== null;
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  send(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("input").addEventListener("input", grow);
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", () => {
  conversation = [];
  for (const turn of $("log").querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("input").focus();
});
$("temperature").addEventListener("input", () => {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
});
poll();

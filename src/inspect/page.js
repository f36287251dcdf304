"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const D = JSON.parse($("data").textContent);
const STEPS = D.steps.length, PER = D.tokens.length, T = STEPS * PER;
const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const DIGIT = Object.fromEntries([...ALPHABET].map((letter, digit) => [letter, digit]));

// ---- data -----------------------------------------------------------------------------------

/// Reads a map of shares: two letters are √p in 4095ths, `~` and two letters a run of zeros.
function decode(text, length) {
  const shares = new Float32Array(length);
  let at = 0;
  const number = (i) => DIGIT[text[i]] * 64 + DIGIT[text[i + 1]];
  for (let i = 0; i < text.length;) {
    if (text[i] === "~") { at += number(i + 1); i += 3; continue; }
    const root = number(i) / 4095;
    shares[at++] = root * root;
    i += 2;
  }
  return shares;
}

const SEGMENT = new Int32Array(T);
for (let s = 0; s + 1 < D.segments.length; s++) SEGMENT.fill(s, D.segments[s], D.segments[s + 1]);
const SEGMENTS = D.segments.length - 1;

/// The maps over tokens: every head, and what every memory recalls.
const MAPS = [
  ...D.attention.map((head) => ({
    name: `Layer ${head.layer}, head ${head.head}`, label: `head ${head.head}`, group: `Layer ${head.layer}`, taught: head.taught, ramp: "blue",
    shares: decode(head.map, T * T),
    reaches: (q, k) => k <= q && (!D.by_segment || SEGMENT[k] === SEGMENT[q]),
  })),
  ...D.memory.map((layer, index) => ({
    name: `Layer ${layer.layer}, through the memory`, label: "memory", group: `Layer ${layer.layer}`, taught: layer.taught, memory: index, ramp: "green",
    shares: decode(layer.recall, T * T),
    start: decode(layer.start, T),
    reaches: (q, k) => layer.reads_after_writing ? SEGMENT[k] <= SEGMENT[q] : SEGMENT[k] < SEGMENT[q],
  })),
];
MAPS.sort((a, b) => a.group.localeCompare(b.group, "en", { numeric: true }) || (a.memory ?? -1) - (b.memory ?? -1));
const MEMORY = D.memory.map((layer) => ({
  ...layer,
  address: decode(layer.address, T * layer.slots),
  written: decode(layer.written, T * layer.slots),
  keep: decode(layer.keep, SEGMENTS * layer.slots),
  recalls: MAPS.find((map) => map.memory === D.memory.indexOf(layer)),
}));
const token = (step, kind) => step * PER + kind;

const state = {
  step: 0, map: Math.max(0, MAPS.findIndex((map) => map.taught)), kind: D.query, layer: 0, order: "time", playing: 0, naming: 0, hover: null,
};
if (D.by_segment && MEMORY.length && !MAPS[state.map].taught) state.map = MAPS.findIndex((map) => map.memory === 0);

// ---- words ----------------------------------------------------------------------------------

const show = (p) => p > 0 && p < 0.005 ? "<0.01" : p.toFixed(2);
const exact = (p) => p >= 0.001 || p === 0 ? p.toFixed(3) : p.toPrecision(1);
const trim = (x) => String(Number(x.toFixed(3)));
const GLYPHS = { "turn left": "↰", "turn right": "↱", forward: "↑", "pick up": "⇑", drop: "⇓", toggle: "⇄", done: "✓", wait: "–" };
const glyph = (action) => GLYPHS[D.actions[action]] ?? D.actions[action].replace(/^(.)\D*/, "$1");
const OBJECTS = ["unseen", "empty", "wall", "floor", "door", "key", "ball", "box", "goal", "lava", "agent"];
const COLOURS = ["red", "green", "blue", "purple", "yellow", "grey"];
const SHORT = ["R", "Gn", "B", "P", "Y", "Gy"];

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) made.setAttribute(name, value);
  return made;
}

/// A row of a bar chart: name, bar, value.
function bar(list, name, share, { chosen = false, tags = [], colour } = {}) {
  const label = element("span", name, { class: chosen ? "name chosen" : "name" });
  for (const [kind, text] of tags) label.append(element("span", text, { class: `tag ${kind}` }));
  const outer = element("span", "", { class: "bar" }), inner = element("i");
  inner.style.width = `${100 * Math.min(1, share)}%`;
  if (colour) inner.style.background = colour;
  outer.append(inner);
  list.append(label, outer, element("span", show(share), { class: chosen ? "value chosen" : "value" }));
}

// ---- colours --------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  blue: [["#f6f8fb", "#b3d2e8", "#559fca", "#1c5f9c", "#081d42"], ["#161b22", "#17406b", "#2f7fb5", "#83c6e6", "#f4fbff"]],
  green: [["#f5f9f7", "#aedccb", "#45ab8a", "#0e6b52", "#03281f"], ["#161b22", "#0f4a3a", "#1f8a6b", "#76d3b2", "#f1fff9"]],
  orange: [["#fbf8f4", "#f6cfa2", "#e18a2f", "#9e4d0a", "#431a00"], ["#1a1815", "#5b3310", "#ab6117", "#f0a750", "#fff5e4"]],
  purple: [["#f8f6fa", "#d3c2e4", "#9d7cc0", "#643e90", "#2a0e4c"], ["#18161d", "#3d2a5c", "#7350a6", "#b99be0", "#faf5ff"]],
};
const RAMP_CACHE = new Map();
/// Where a share stands on a ramp: by its root, so that small ones are seen. What is kept is mostly 1, so there what is erased stands out.
const height = (name, p) => name === "purple" ? 1 - p : Math.sqrt(p);
/// 256 colours of a ramp.
function ramp(name) {
  const key = name + dark.matches;
  if (!RAMP_CACHE.has(key)) {
    const stops = RAMPS[name][dark.matches ? 1 : 0].map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    const colours = new Uint8ClampedArray(256 * 3);
    for (let i = 0; i < 256; i++) {
      const place = (i / 255) * (stops.length - 1), low = Math.min(stops.length - 2, Math.floor(place));
      for (let c = 0; c < 3; c++) colours[3 * i + c] = stops[low][c] + (stops[low + 1][c] - stops[low][c]) * (place - low);
    }
    RAMP_CACHE.set(key, colours);
  }
  return RAMP_CACHE.get(key);
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (colours, i) => `rgb(${colours[3 * i]},${colours[3 * i + 1]},${colours[3 * i + 2]})`;

/// A picture of `columns` × `rows` cells; `share(row, column)` is null where there is nothing.
function picture(columns, rows, name, share) {
  const canvas = element("canvas");
  canvas.width = columns; canvas.height = rows;
  const ctx = canvas.getContext("2d"), image = ctx.createImageData(columns, rows), colours = ramp(name);
  for (let row = 0, at = 0; row < rows; row++) for (let column = 0; column < columns; column++, at += 4) {
    const p = share(row, column);
    if (p === null) continue;
    const i = 3 * Math.round(255 * height(name, Math.min(1, Math.max(0, p))));
    image.data[at] = colours[i]; image.data[at + 1] = colours[i + 1]; image.data[at + 2] = colours[i + 2]; image.data[at + 3] = 255;
  }
  ctx.putImageData(image, 0, 0);
  return canvas;
}

/// Sizes a canvas in CSS pixels and gives its context, scaled to the screen's.
function fit(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
  const ctx = canvas.getContext("2d");
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.clearRect(0, 0, width, height);
  return ctx;
}

function scale(box, name, note, floor) {
  box.replaceChildren();
  const canvas = element("canvas", "", { "aria-hidden": "true" });
  const ctx = fit(canvas, 220, 26), colours = ramp(name);
  for (let x = 0; x < 200; x++) { ctx.fillStyle = rgb(colours, Math.round((255 * x) / 199)); ctx.fillRect(10 + x, 0, 1.5, 9); }
  ctx.strokeStyle = css("--line"); ctx.strokeRect(9.5, 0.5, 201, 9);
  ctx.fillStyle = css("--soft"); ctx.font = "11px system-ui, sans-serif"; ctx.textAlign = "center";
  for (const p of name === "purple" ? [1, 0.75, 0.5, 0.25, 0] : [0, 0.01, 0.1, 0.25, 0.5, 1]) ctx.fillText(String(p), 10 + 200 * height(name, p), 22);
  box.append(canvas);
  if (note) box.append(note);
  if (floor > 0) box.append(element("span", `Shares below ${floor} are not shown.`));
}

// ---- frames ---------------------------------------------------------------------------------

const PAINT = ["#ef4b45", "#3fbf5f", "#5593ff", "#b27df2", "#f3d23c", "#c3c8d0"];
function cell(ctx, x, y, s, [kind, colour, status], letters) {
  const paint = PAINT[colour] ?? "#fff", line = Math.max(1, s / 14);
  ctx.fillStyle = "#15181d"; ctx.fillRect(x, y, s, s);
  ctx.strokeStyle = "#373c45"; ctx.lineWidth = 0.6; ctx.strokeRect(x + 0.3, y + 0.3, s - 0.6, s - 0.6);
  ctx.lineWidth = line; ctx.strokeStyle = ctx.fillStyle = paint;
  const circle = (cx, cy, r) => { ctx.beginPath(); ctx.arc(x + cx * s, y + cy * s, r * s, 0, 7); };
  switch (OBJECTS[kind]) {
    case "unseen": ctx.fillStyle = "#2b2f36"; ctx.fillRect(x, y, s, s); break;
    case "wall":
      ctx.fillStyle = "#6d737d"; ctx.fillRect(x, y, s, s);
      ctx.strokeStyle = "#858c97"; ctx.lineWidth = 0.8; ctx.strokeRect(x + 0.5, y + 0.5, s - 1, s - 1);
      break;
    case "door":
      if (status === 0) {
        ctx.strokeRect(x + line / 2, y + line / 2, s - line, s - line);
        ctx.fillRect(x + s * 0.04, y + s * 0.04, s * 0.16, s * 0.92);
      } else {
        ctx.globalAlpha = 0.38; ctx.fillRect(x, y, s, s); ctx.globalAlpha = 1;
        ctx.strokeRect(x + s * 0.06, y + s * 0.06, s * 0.88, s * 0.88);
        ctx.strokeRect(x + s * 0.2, y + s * 0.2, s * 0.6, s * 0.6);
        if (status === 2) ctx.fillRect(x + s * 0.4, y + s * 0.45, s * 0.2, s * 0.14);
        else { circle(0.7, 0.5, 0.07); ctx.fill(); }
      }
      break;
    case "ball": circle(0.5, 0.5, 0.31); ctx.fill(); break;
    case "key":
      ctx.lineWidth = s * 0.1; circle(0.5, 0.28, 0.15); ctx.stroke();
      ctx.fillRect(x + s * 0.45, y + s * 0.42, s * 0.1, s * 0.44);
      ctx.fillRect(x + s * 0.3, y + s * 0.62, s * 0.17, s * 0.08);
      ctx.fillRect(x + s * 0.3, y + s * 0.77, s * 0.17, s * 0.08);
      break;
    case "box":
      ctx.lineWidth = s * 0.09; ctx.strokeRect(x + s * 0.2, y + s * 0.2, s * 0.6, s * 0.6);
      ctx.fillRect(x + s * 0.2, y + s * 0.45, s * 0.6, s * 0.1);
      break;
    case "goal": ctx.fillStyle = PAINT[1]; ctx.fillRect(x + 1, y + 1, s - 2, s - 2); break;
    case "lava": ctx.fillStyle = "#ff7a1a"; ctx.fillRect(x + 1, y + 1, s - 2, s - 2); break;
    default: return;
  }
  if (letters && s >= 24 && kind >= 4 && kind <= 7) {
    ctx.font = `700 ${Math.round(s * 0.27)}px system-ui, sans-serif`; ctx.textAlign = "right"; ctx.textBaseline = "alphabetic";
    ctx.lineWidth = 3; ctx.lineJoin = "round"; ctx.strokeStyle = "#15181d"; ctx.strokeText(SHORT[colour], x + s - 2, y + s - 3);
    ctx.fillStyle = "#fff"; ctx.fillText(SHORT[colour], x + s - 2, y + s - 3);
  }
}

const cells = (step) => {
  const codes = [...D.frames.steps[step]].map((letter) => DIGIT[letter]);
  return (vx, vy) => codes.slice(3 * (7 * vx + vy), 3 * (7 * vx + vy) + 3);
};

const TILES = { key: "#2f7fd6", cue: "#2f7fd6", value: "#c46a08", distractor: "#6d737d", query: "#0c8a63" };

/// Draws the observation of a step into a square.
function drawFrame(ctx, step, size, letters = false) {
  ctx.textBaseline = "alphabetic";
  ctx.fillStyle = "#15181d"; ctx.fillRect(0, 0, size, size);
  if (D.frames.kind === "grid") {
    const s = size / 7, at = cells(step);
    for (let vx = 0; vx < 7; vx++) for (let vy = 0; vy < 7; vy++) cell(ctx, vx * s, vy * s, s, at(vx, vy), letters);
    const x = 3.5 * s, y = 6.5 * s;
    ctx.beginPath(); ctx.moveTo(x, y - 0.36 * s); ctx.lineTo(x + 0.3 * s, y + 0.32 * s); ctx.lineTo(x - 0.3 * s, y + 0.32 * s); ctx.closePath();
    ctx.fillStyle = "#ff5a4f"; ctx.fill(); ctx.strokeStyle = "#fff"; ctx.lineWidth = Math.max(0.6, s / 22); ctx.stroke();
  } else if (D.frames.kind === "symbols") {
    const tiles = D.frames.steps[step], gap = size * 0.06;
    const width = (size - gap * 3) / 2, height = size * 0.62, left = (size - tiles.length * width - (tiles.length - 1) * gap) / 2;
    tiles.forEach(([name, number], i) => {
      const x = left + i * (width + gap), y = (size - height) / 2;
      ctx.fillStyle = TILES[name]; ctx.beginPath(); ctx.roundRect(x, y, width, height, size * 0.05); ctx.fill();
      ctx.fillStyle = "#fff"; ctx.textAlign = "center"; ctx.font = `700 ${Math.round(size * 0.22)}px system-ui, sans-serif`;
      ctx.fillText(number === null ? "?" : String(number), x + width / 2, y + height * (size > 60 ? 0.56 : 0.66));
      if (size > 60) { ctx.font = `${Math.round(Math.min(15, size * 0.065))}px system-ui, sans-serif`; ctx.fillText(name, x + width / 2, y + height * 0.82); }
    });
  } else {
    const codes = D.frames.steps[step], side = Math.ceil(Math.sqrt(codes.length)), s = size / side, most = Math.max(1, ...codes), colours = ramp("blue");
    codes.forEach((code, i) => { ctx.fillStyle = rgb(colours, Math.round((255 * code) / most)); ctx.fillRect((i % side) * s, Math.floor(i / side) * s, s, s); });
  }
}

function mini(step, size = 46) {
  const canvas = element("canvas", "", { role: "img", "aria-label": `Step ${step}: ${describe(step)}` });
  drawFrame(fit(canvas, size, size), step, size);
  return canvas;
}

/// What is in view, in words.
function describe(step) {
  if (D.frames.kind === "symbols") return D.frames.steps[step].map(([name, number]) => number === null ? name : `${name} ${number}`).join(", ") || "nothing";
  if (D.frames.kind !== "grid") return "codes " + D.frames.steps[step].slice(0, 24).join(" ");
  const at = cells(step), seen = [];
  for (let vx = 0; vx < 7; vx++) for (let vy = 0; vy < 7; vy++) {
    const [kind, colour, status] = at(vx, vy);
    if (kind < 4) continue;
    const ahead = 6 - vy, side = vx - 3, place = [];
    if (ahead) place.push(`${ahead} ahead`);
    if (side) place.push(`${Math.abs(side)} ${side < 0 ? "left" : "right"}`);
    const door = kind === 4 ? ["open ", "closed ", "locked "][status] ?? "" : "";
    seen.push([ahead + Math.abs(side), `${door}${COLOURS[colour]} ${OBJECTS[kind]} (${place.join(", ")})`]);
  }
  seen.sort((a, b) => a[0] - b[0]);
  return seen.map(([, text]) => text).join("; ") || "no object";
}

// ---- top ------------------------------------------------------------------------------------

function drawTop() {
  const [task, ...settings] = D.task.split(",");
  const known = D.label === task || D.label === D.task, title = (task[0].toUpperCase() + task.slice(1)) + (known ? "" : ` “${D.label}”`);
  document.title = `${title}, episode ${D.episode}: ${D.success ? "success" : "failure"}`;
  $("title").textContent = `${title}, episode ${D.episode}`;
  const reward = D.steps.reduce((sum, step) => sum + step.reward, 0);
  $("facts").textContent = [
    settings.map((setting) => setting.replace("=", " ")).join(", "), `seed ${D.seed}`,
    `${STEPS} step${STEPS === 1 ? "" : "s"}`, `return ${trim(reward)}`, `model ${D.name}, ${D.parameters.toLocaleString("en")} parameters, trained for ${D.trained_steps.toLocaleString("en")} steps`,
  ].filter(Boolean).join(" · ");
  $("verdict").classList.toggle("good", D.success);
  $("outcome").textContent = D.success ? "✓ Success" : D.timed_out ? "✕ Failure: out of time" : "✕ Failure";
  $("verdict-text").textContent = D.verdict;
  $("reasons").replaceChildren(...D.reasons.map((reason) => element("p", reason)));
  $("go").textContent = `Show step ${D.focus}`;
  $("go").addEventListener("click", () => { go(D.focus); $("now").scrollIntoView({ block: "start" }); });
  const key = $("strip-key"), explained = (sign, text, css) => {
    const span = element("span", text); span.prepend(element("b", sign, { class: `dot ${css}` })); key.append(span);
  };
  if (D.steps.some((step) => step.differs)) explained("≠", "another action than the expert’s", "");
  if (D.steps.some((step) => step.recalls.length)) explained("↩", "follows from an earlier step", "needs");
  if (D.left_at !== null && D.left_at + 1 < STEPS) key.append(element("span", `After step ${D.left_at} there is no expert to compare with: it is only defined on its own way.`));
}

const STRIP = [];
function drawStrip() {
  const lazy = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) {
      lazy.unobserve(target);
      target.prepend(mini(Number(target.dataset.step), 46));
    }
  }, { root: $("strip"), rootMargin: "400px" });
  D.steps.forEach((step, index) => {
    const button = element("button", "", { type: "button", tabindex: -1, "data-step": index, class: step.differs ? "differs" : undefined, "aria-label": said(index), title: said(index) });
    button.append(element("b", glyph(step.action)), element("span", String(index)));
    if (step.differs) button.append(element("span", "≠", { class: "mark", "aria-hidden": "true" }));
    if (step.recalls.length) button.append(element("span", "↩", { class: "mark needs", "aria-hidden": "true" }));
    button.style.minHeight = "94px"; button.style.alignContent = "end";
    button.addEventListener("click", () => go(index));
    STRIP.push(button); lazy.observe(button);
  });
  $("strip").replaceChildren(...STRIP);
}

function said(index) {
  const step = D.steps[index];
  return `Step ${index}: ${D.actions[step.action]}${step.differs ? `; the expert: ${D.actions[step.expert]}` : ""}`;
}

// ---- this step ------------------------------------------------------------------------------

const FRAME = 280;
const MOST_ACTIONS = 24;
const SHOWN_ACTIONS = (() => {
  const all = D.actions.map((_, action) => action);
  if (all.length <= MOST_ACTIONS) return all;
  const most = all.map((action) => Math.max(...D.steps.map((step) => step.probabilities[action])));
  return all.sort((a, b) => most[b] - most[a]).slice(0, MOST_ACTIONS).sort((a, b) => a - b);
})();

function drawNow() {
  const index = state.step, step = D.steps[index];
  $("now-title").textContent = `Step ${index} of ${STEPS - 1}`;
  const width = Math.min(FRAME, $("frame").parentElement.clientWidth || FRAME);
  drawFrame(fit($("frame"), width, width), index, width, true);
  const seen = describe(index);
  $("frame").setAttribute("aria-label", `The agent sees: ${seen}`);
  $("in-view").textContent = `In view: ${seen}.` + (step.told === undefined ? "" : ` Return to go: ${trim(step.told)}.`);

  const chosen = D.actions[step.action], choice = $("choice");
  choice.replaceChildren(element("b", chosen), ` with probability ${show(step.probabilities[step.action])}. `);
  if (step.expert === null) choice.append("No expert for this state.");
  else if (step.differs) choice.append(element("b", `Differs from the expert: ${D.actions[step.expert]}.`, { class: "differs" }));
  else choice.append("So does the expert.");
  if (step.reward) choice.append(` Reward ${trim(step.reward)}.`);
  if (index === STEPS - 1) choice.append(D.success ? " The episode ends in success." : " The episode ends in failure.");
  const bars = element("div", "", { class: "bars" });
  const actions = SHOWN_ACTIONS.slice();
  for (const action of [step.action, step.expert]) if (action !== null && !actions.includes(action)) actions.push(action);
  for (const action of actions) {
    const tags = [];
    if (action === step.action) tags.push([step.differs ? "wrong" : "model", "model"]);
    if (action === step.expert) tags.push(["expert", "expert"]);
    bar(bars, D.actions[action], step.probabilities[action] ?? 0, { chosen: action === step.action, tags, colour: action === step.action && step.differs ? "var(--bad)" : undefined });
  }
  $("actions").replaceChildren(bars);
  drawRecalls(index, step);
}

/// Sum of a map's row over the tokens of steps first to last.
const mass = (map, query, first, last = first) => {
  let sum = 0;
  for (let k = token(first, 0); k < token(last + 1, 0); k++) sum += map.shares[query * T + k];
  return sum;
};

function stepButton(step) {
  const button = element("button", "", { type: "button", class: "mini", "aria-label": `Go to step ${step}`, title: `Go to step ${step}` });
  button.append(mini(step, 56));
  button.addEventListener("click", () => go(step));
  return button;
}

function drawRecalls(index, step) {
  const box = $("recalls"), query = token(index, D.query);
  box.replaceChildren();
  if (!step.recalls.length) {
    box.append(element("p", step.expert === null ? "Not known: the episode has left the expert’s way." : "Nothing: no earlier step is annotated for this one.", { class: "soft" }));
    return;
  }
  for (const source of step.recalls.slice(0, 6)) {
    const row = element("div", "", { class: "source" }), text = element("div"), bars = element("div", "", { class: "bars" });
    text.append(element("p", `Step ${source}: ${describe(source)}`));
    let unreached = 0;
    for (const map of MAPS) {
      const segment = SEGMENT[token(source, D.query)];
      if (map.memory !== undefined) {
        const [first, last] = [D.segments[segment] / PER, D.segments[segment + 1] / PER - 1];
        bar(bars, `L${MEMORY[map.memory].layer} memory, step ${source}`, mass(map, query, source), { colour: "var(--good)", tags: map.taught ? [["taught", "taught"]] : [] });
        if (last > first) bar(bars, `… its segment, ${first} to ${last}`, mass(map, query, first, last), { colour: "var(--good)" });
      } else if (map.reaches(query, token(source, D.query))) {
        bar(bars, map.name, mass(map, query, source), { tags: map.taught ? [["taught", "taught"]] : [] });
      } else unreached++;
    }
    text.append(bars);
    if (unreached) text.append(element("div", "Attention does not reach it: it ends at the segment.", { class: "soft" }));
    row.append(stepButton(source), text); box.append(row);
  }
  if (step.recalls.length > 6) box.append(element("p", `And ${step.recalls.length - 6} more steps.`, { class: "soft" }));
}

// ---- attention ------------------------------------------------------------------------------

const PICTURES = new Map();
function mapPicture(map) {
  const key = map.name + dark.matches;
  if (!PICTURES.has(key)) PICTURES.set(key, picture(T, T, map.ramp, (q, k) => map.reaches(q, k) ? map.shares[q * T + k] : null));
  return PICTURES.get(key);
}

function drawHeads() {
  const box = $("heads");
  box.replaceChildren();
  let group = "";
  MAPS.forEach((map, index) => {
    if (map.group !== group) { group = map.group; box.append(element("h3", group)); }
    const button = element("button", "", { type: "button", "aria-pressed": String(index === state.map), "aria-label": map.name + (map.taught ? ", taught to recall" : "") });
    const canvas = element("canvas", "", { "aria-hidden": "true" }), ctx = fit(canvas, 72, 72);
    ctx.fillStyle = css("--off"); ctx.fillRect(0, 0, 72, 72);
    ctx.imageSmoothingEnabled = T > 72 * (devicePixelRatio || 1);
    ctx.drawImage(mapPicture(map), 0, 0, 72, 72);
    button.append(canvas, element("span", map.label));
    if (map.taught) button.append(element("span", "taught", { class: "tag taught", style: "margin:0" }));
    button.addEventListener("click", () => { state.map = index; drawHeads(); drawMap(); drawLooks(); box.querySelectorAll("button")[index].focus(); });
    box.append(button);
  });
}

/// Steps between two labels of an axis of so many pixels.
const every = (pixels) => [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((n) => (pixels / STEPS) * n >= 26) ?? 2000;

const MARGIN = { left: 46, top: 6, right: 6, bottom: 38 };
function mapSize() {
  const width = Math.max(240, Math.min(640, $("map").parentElement.clientWidth));
  return { width, inner: width - MARGIN.left - MARGIN.right };
}

function stepAxis(ctx, inner, y) {
  ctx.fillStyle = css("--soft"); ctx.font = "11px system-ui, sans-serif"; ctx.textAlign = "center"; ctx.textBaseline = "alphabetic";
  for (let s = 0, n = every(inner); s < STEPS; s += n) ctx.fillText(String(s), MARGIN.left + ((s + 0.5) * inner) / STEPS, y);
}

function drawMap() {
  const map = MAPS[state.map];
  if (!map) return;
  const { width, inner } = mapSize(), unit = inner / T, { left, top } = MARGIN;
  const ctx = fit($("map"), width, top + inner + MARGIN.bottom);
  ctx.fillStyle = css("--off"); ctx.fillRect(left, top, inner, inner);
  ctx.imageSmoothingEnabled = unit * (devicePixelRatio || 1) < 1;
  ctx.drawImage(mapPicture(map), left, top, inner, inner);
  ctx.strokeStyle = css("--line"); ctx.lineWidth = 1; ctx.strokeRect(left - 0.5, top - 0.5, inner + 1, inner + 1);
  if (SEGMENTS > 1) {
    ctx.globalAlpha = 0.5; ctx.strokeStyle = css("--soft"); ctx.setLineDash([3, 3]); ctx.beginPath();
    for (let s = 1; s < SEGMENTS; s++) {
      const at = D.segments[s] * unit;
      ctx.moveTo(left + at, top); ctx.lineTo(left + at, top + inner); ctx.moveTo(left, top + at); ctx.lineTo(left + inner, top + at);
    }
    ctx.stroke(); ctx.setLineDash([]); ctx.globalAlpha = 1;
  }
  const ring = Math.max(unit + 3, 7);
  ctx.lineWidth = unit < 4 ? 1.5 : 2.5; ctx.strokeStyle = css("--mark");
  D.steps.forEach((step, index) => {
    for (const source of step.recalls) ctx.strokeRect(left + (token(source, D.query) + 0.5) * unit - ring / 2, top + (token(index, D.query) + 0.5) * unit - ring / 2, ring, ring);
  });
  // The step at hand.
  const y = top + token(state.step, 0) * unit, h = Math.max(PER * unit, 3);
  ctx.strokeStyle = css("--now"); ctx.lineWidth = 1.5; ctx.strokeRect(left - 1, y - 0.75, inner + 2, h + 1.5);
  ctx.fillStyle = css("--now"); ctx.beginPath(); ctx.moveTo(left - 3, y + h / 2); ctx.lineTo(left - 10, y + h / 2 - 5); ctx.lineTo(left - 10, y + h / 2 + 5); ctx.fill();
  if (state.hover) {
    const [q, k] = state.hover;
    ctx.strokeStyle = css("--accent"); ctx.lineWidth = 1; ctx.beginPath();
    ctx.moveTo(left + (k + 0.5) * unit, top); ctx.lineTo(left + (k + 0.5) * unit, top + inner); ctx.moveTo(left, top + (q + 0.5) * unit); ctx.lineTo(left + inner, top + (q + 0.5) * unit); ctx.stroke();
  }
  stepAxis(ctx, inner, top + inner + 15);
  ctx.textAlign = "center"; ctx.fillText("step looked at", left + inner / 2, top + inner + 32);
  ctx.textAlign = "right"; ctx.textBaseline = "middle";
  for (let s = 0, n = every(inner); s < STEPS; s += n) if (s !== state.step) ctx.fillText(String(s), left - 13, top + ((s + 0.5) * inner) / STEPS);
  ctx.fillStyle = css("--ink"); ctx.font = "700 11px system-ui, sans-serif"; ctx.fillText(String(state.step), left - 13, y + h / 2);
  ctx.save(); ctx.translate(10, top + inner / 2); ctx.rotate(-Math.PI / 2); ctx.fillStyle = css("--soft"); ctx.font = "11px system-ui, sans-serif"; ctx.textAlign = "center"; ctx.fillText("step that looks", 0, 0); ctx.restore();

  $("map-title").replaceChildren(element("b", map.name));
  if (map.taught) $("map-title").append(element("span", "taught to recall", { class: "tag taught" }));
  if (map.memory !== undefined) $("map-title").append(": the share of each step’s write in what a later step reads");
  $("map").setAttribute("aria-label", `${map.name}. At step ${state.step} the ${D.tokens[state.kind]} looks most at ${tops(map, token(state.step, state.kind), 3).map(([k, p]) => `step ${Math.floor(k / PER)}, ${D.tokens[k % PER]} (${show(p)})`).join(", ") || "nothing"}.`);
}

function drawScales() {
  const map = MAPS[state.map];
  const note = element("span");
  note.append(element("i", "", { class: "ring" }), "annotated: the step that looks should recall the other");
  if (map) scale($("map-scale"), map.ramp, D.steps.some((step) => step.recalls.length) ? note : null, D.attention_floor);
  scale($("written-scale"), "orange", null, D.memory_floor);
  scale($("address-scale"), "blue", null, D.memory_floor);
  scale($("keep-scale"), "purple", null, 0);
}

/// The largest entries of a row.
function tops(map, query, most) {
  const row = [];
  for (let k = 0; k < T; k++) if (map.shares[query * T + k] > 0.0005) row.push([k, map.shares[query * T + k]]);
  return row.sort((a, b) => b[1] - a[1]).slice(0, most);
}

/// A list of steps with shares; each goes there.
function stepList(rows, colour) {
  const list = element("div", "", { class: "looks-list" });
  for (const { step, text, share, annotated } of rows) {
    if (step === undefined) {
      const plain = element("div", "", { class: "plain" });
      plain.append(element("span", text), element("span", show(share)));
      list.append(plain);
      continue;
    }
    const button = element("button", "", { type: "button", "aria-label": `${text}: ${show(share)}${annotated ? ", annotated" : ""}. Go there.` });
    const middle = element("span"), outer = element("span", "", { class: "bar" }), inner = element("i");
    inner.style.width = `${100 * Math.min(1, share)}%`; inner.style.background = colour;
    outer.style.display = "block"; outer.append(inner);
    middle.append(element("span", text));
    if (annotated) middle.append(element("span", "annotated", { class: "tag taught" }));
    middle.append(outer);
    button.append(mini(step, 40), middle, element("span", show(share)));
    button.addEventListener("click", () => go(step));
    list.append(button);
  }
  return list;
}

function drawLooks() {
  const map = MAPS[state.map];
  if (!map) return;
  const query = token(state.step, state.kind), recalls = D.steps[state.step].recalls;
  $("looks-title").textContent = map.memory === undefined ? `Step ${state.step} looks at` : `Step ${state.step} reads what was written at`;
  const rows = tops(map, query, 6).map(([k, share]) => {
    const step = Math.floor(k / PER);
    return { step, share, text: `step ${step}, ${D.tokens[k % PER]}`, annotated: state.kind === D.query && k % PER === D.query && recalls.includes(step) };
  });
  if (map.start) rows.push({ text: "left of the initial memory", share: map.start[query] });
  if (!rows.length) rows.push({ text: "nothing above 0.001", share: 0 });
  $("looks").replaceChildren(stepList(rows, map.ramp === "green" ? "var(--good)" : "var(--accent)"));
}

function kindButtons(id) {
  $(id).replaceChildren(...D.tokens.map((kind, index) => {
    const button = element("button", kind + (index === D.query ? " (chooses)" : ""), { type: "button", "aria-pressed": String(index === state.kind) });
    button.addEventListener("click", () => { state.kind = index; kindButtons("kinds"); kindButtons("memory-kinds"); draw(); $(id).children[index].focus(); });
    return button;
  }));
}

// ---- memory ---------------------------------------------------------------------------------

const ORDERS = new Map();
/// Slots as they are shown: by number, or by the token that writes them most.
function order() {
  const key = state.layer + state.order;
  if (!ORDERS.has(key)) {
    const { slots, written } = MEMORY[state.layer], list = [...Array(slots).keys()];
    if (state.order === "time") {
      const at = list.map((slot) => {
        let best = 0;
        for (let t = 1; t < T; t++) if (written[t * slots + slot] > written[best * slots + slot]) best = t;
        return best;
      });
      list.sort((a, b) => at[a] - at[b] || a - b);
    }
    ORDERS.set(key, list);
  }
  return ORDERS.get(key);
}

const MEMORY_PICTURES = new Map();
const KINDS = {
  written: { ramp: "orange", of: (memory, t, slot) => memory.written[t * memory.slots + slot] },
  address: { ramp: "blue", of: (memory, t, slot) => memory.address[t * memory.slots + slot] },
  keep: { ramp: "purple", of: (memory, t, slot) => memory.keep[SEGMENT[t] * memory.slots + slot] },
};

function memoryPicture(kind) {
  const key = [kind, state.layer, state.order, dark.matches].join();
  if (!MEMORY_PICTURES.has(key)) {
    const memory = MEMORY[state.layer], slots = order(), { ramp, of } = KINDS[kind];
    MEMORY_PICTURES.set(key, picture(T, memory.slots, ramp, (row, t) => of(memory, t, slots[row])));
  }
  return MEMORY_PICTURES.get(key);
}

function memorySize() {
  const width = Math.max(240, $("written").parentElement.clientWidth), slots = MEMORY[state.layer].slots;
  return { width, inner: width - MARGIN.left - MARGIN.right, tall: Math.max(90, Math.min(260, slots * 5)) };
}

function drawMemoryMap(kind) {
  const { width, inner, tall } = memorySize(), { left, top } = MARGIN, slots = MEMORY[state.layer].slots;
  const ctx = fit($(kind), width, top + tall + 20), unit = inner / T;
  ctx.imageSmoothingEnabled = slots > tall * (devicePixelRatio || 1) || unit * (devicePixelRatio || 1) < 1;
  ctx.drawImage(memoryPicture(kind), left, top, inner, tall);
  ctx.strokeStyle = css("--line"); ctx.lineWidth = 1; ctx.strokeRect(left - 0.5, top - 0.5, inner + 1, tall + 1);
  ctx.globalAlpha = 0.6; ctx.strokeStyle = css("--soft"); ctx.setLineDash([3, 3]); ctx.beginPath();
  for (let s = 1; s < SEGMENTS; s++) { ctx.moveTo(left + D.segments[s] * unit, top); ctx.lineTo(left + D.segments[s] * unit, top + tall); }
  ctx.stroke(); ctx.setLineDash([]); ctx.globalAlpha = 1;
  const x = left + token(state.step, 0) * unit;
  ctx.strokeStyle = css("--now"); ctx.lineWidth = 1.5; ctx.strokeRect(x - 0.75, top - 1, Math.max(PER * unit, 3) + 1.5, tall + 2);
  stepAxis(ctx, inner, top + tall + 15);
  ctx.save(); ctx.translate(12, top + tall / 2); ctx.rotate(-Math.PI / 2); ctx.textAlign = "center"; ctx.fillText(`${slots} slots`, 0, 0); ctx.restore();
  $(kind).setAttribute("aria-label", `${kind} of ${slots} slots over the steps; at step ${state.step}, ${D.tokens[state.kind]}: ${topSlots(kind, 3)}`);
}

function topSlots(kind, most) {
  const memory = MEMORY[state.layer], t = token(state.step, state.kind);
  const all = [...Array(memory.slots).keys()].map((slot) => [slot, KINDS[kind].of(memory, t, slot)]);
  all.sort((a, b) => b[1] - a[1]);
  return all.slice(0, most).map(([slot, p]) => `slot ${slot} (${show(p)})`).join(", ");
}

const SLOTS = { height: 190, top: 18, bottom: 20 };
function drawSlots() {
  const memory = MEMORY[state.layer], t = token(state.step, state.kind), list = order();
  $("slots-title").textContent = `Slots at step ${state.step}`;
  const width = Math.max(240, $("slots").parentElement.clientWidth), inner = width - 40;
  const ctx = fit($("slots"), width, SLOTS.height), middle = (SLOTS.top + SLOTS.height - SLOTS.bottom) / 2, half = middle - SLOTS.top;
  let most = 0.05;
  for (const p of memory.address) most = Math.max(most, p);
  const step = inner / memory.slots, barWidth = Math.max(0.8, step * 0.78);
  const up = rgb(ramp("blue"), 160), down = rgb(ramp("orange"), 150), kept = rgb(ramp("purple"), 170);
  list.forEach((slot, i) => {
    const x = 40 + i * step, w = memory.address[t * memory.slots + slot], written = memory.written[t * memory.slots + slot];
    ctx.fillStyle = up; ctx.fillRect(x, middle - (half * w) / most, barWidth, (half * w) / most);
    ctx.fillStyle = down; ctx.fillRect(x, middle, barWidth, (half * written) / most);
    ctx.fillStyle = kept; ctx.globalAlpha = memory.keep[SEGMENT[t] * memory.slots + slot]; ctx.fillRect(x, SLOTS.height - 14, barWidth, 7); ctx.globalAlpha = 1;
  });
  ctx.strokeStyle = css("--line"); ctx.beginPath(); ctx.moveTo(40, middle); ctx.lineTo(width, middle); ctx.stroke();
  ctx.fillStyle = css("--soft"); ctx.font = "11px system-ui, sans-serif"; ctx.textBaseline = "alphabetic"; ctx.textAlign = "left";
  ctx.fillText(`read: w, up to ${show(most)}`, 40, 11);
  ctx.fillText("written: w·β", 40, SLOTS.height - 18);
  ctx.textAlign = "right"; ctx.fillText("kept", 34, SLOTS.height - 7); ctx.fillText(show(most), 34, SLOTS.top + 8); ctx.fillText("0", 34, middle + 4);
  $("slots").setAttribute("aria-label", `Read: ${topSlots("address", 3)}. Written: ${topSlots("written", 3)}.`);

  const map = memory.recalls, byStep = [];
  for (let s = 0; s < STEPS; s++) { const share = mass(map, t, s); if (share > 0.0005) byStep.push({ step: s, share, text: `step ${s}`, annotated: D.steps[state.step].recalls.includes(s) }); }
  byStep.sort((a, b) => b.share - a.share);
  const rows = byStep.slice(0, 5);
  rows.push({ text: "left of the initial memory", share: map.start[t] });
  $("reads").replaceChildren(stepList(rows, "var(--good)"));

  // What all tokens of this step have written, and how much of it later segments leave.
  const box = $("survives");
  let left = new Float64Array(memory.slots), all = 0;
  for (let k = 0; k < PER; k++) for (let i = 0; i < memory.slots; i++) left[i] += memory.written[token(state.step, k) * memory.slots + i];
  for (const p of left) all += p;
  box.replaceChildren();
  const own = SEGMENT[t];
  if (all < 0.001) { box.append(element("p", "It wrote next to nothing.", { class: "soft" })); return; }
  if (own + 1 >= SEGMENTS) { box.append(element("p", "No segment follows that could read it.", { class: "soft" })); return; }
  const bars = element("div", "", { class: "bars" });
  for (let s = own + 1; s < SEGMENTS && s <= own + 8; s++) {
    let sum = 0;
    for (const p of left) sum += p;
    bar(bars, `for steps ${D.segments[s] / PER} to ${D.segments[s + 1] / PER - 1}`, sum / all, { colour: rgb(ramp("purple"), 170) });
    left = left.map((p, i) => p * memory.keep[s * memory.slots + i]);
  }
  box.append(element("p", `It wrote ${show(all)} in all, over its tokens and the slots. Of that, there is left`, { class: "soft" }), bars);
}

function drawMemory() {
  if (!MEMORY.length) return;
  for (const kind of Object.keys(KINDS)) drawMemoryMap(kind);
  drawSlots();
}

function layerButtons() {
  if (MEMORY.length < 2) return;
  $("layers").replaceChildren(...MEMORY.map((memory, index) => {
    const button = element("button", `Layer ${memory.layer}`, { type: "button", "aria-pressed": String(index === state.layer) });
    button.addEventListener("click", () => { state.layer = index; layerButtons(); drawMemory(); $("layers").children[index].focus(); });
    return button;
  }));
}

// ---- pointing -------------------------------------------------------------------------------

const tip = $("tip");
function showTip(event, text, steps = []) {
  tip.replaceChildren(text);
  if (steps.length) {
    const frames = element("div", "", { class: "frames" });
    for (const step of steps) frames.append(mini(step, 64));
    tip.append(frames);
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(innerWidth - width - 8, event.clientX + 16))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight - 70 ? event.clientY - height - 14 : event.clientY + 18}px`;
}

function pointing(canvas, find, leave) {
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    if (!find(event.clientX - box.left, event.clientY - box.top, event)) { tip.hidden = true; leave?.(); }
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; leave?.(); });
}

const mapCell = (x, y) => {
  const { inner } = mapSize(), k = Math.floor(((x - MARGIN.left) / inner) * T), q = Math.floor(((y - MARGIN.top) / inner) * T);
  return k >= 0 && k < T && q >= 0 && q < T ? [q, k] : null;
};
pointing($("map"), (x, y, event) => {
  const at = mapCell(x, y);
  if (!at) return false;
  state.hover = at;
  drawMap();
  const [q, k] = at, map = MAPS[state.map], [from, to] = [Math.floor(q / PER), Math.floor(k / PER)];
  const annotated = q % PER === D.query && k % PER === D.query && D.steps[from].recalls.includes(to);
  const share = map.reaches(q, k) ? `${map.memory === undefined ? "Probability" : "Share"} ${exact(map.shares[q * T + k])}` : k > q ? "The future: cannot be looked at" : map.memory === undefined ? "In another segment: out of reach" : "In the same segment: not yet written";
  showTip(event, `Step ${from}, ${D.tokens[q % PER]}\nlooks at step ${to}, ${D.tokens[k % PER]}\n${share}${annotated ? "\nAnnotated pair" : ""}`, from === to ? [from] : [from, to]);
  return true;
}, () => { if (state.hover) { state.hover = null; drawMap(); } });
$("map").addEventListener("click", (event) => {
  const box = $("map").getBoundingClientRect(), at = mapCell(event.clientX - box.left, event.clientY - box.top);
  if (at) { state.kind = at[0] % PER; kindButtons("kinds"); kindButtons("memory-kinds"); go(Math.floor(at[0] / PER)); }
});
if (MEMORY.length) for (const kind of Object.keys(KINDS)) {
  const find = (x, y) => {
    const { inner, tall } = memorySize(), t = Math.floor(((x - MARGIN.left) / inner) * T), row = Math.floor(((y - MARGIN.top) / tall) * MEMORY[state.layer].slots);
    return t >= 0 && t < T && row >= 0 && row < MEMORY[state.layer].slots ? [t, order()[row]] : null;
  };
  pointing($(kind), (x, y, event) => {
    const at = find(x, y);
    if (!at) return false;
    const [t, slot] = at, step = Math.floor(t / PER), of = (name) => exact(KINDS[name].of(MEMORY[state.layer], t, slot));
    showTip(event, `Slot ${slot}, step ${step}, ${D.tokens[t % PER]}\nwritten ${of("written")}, read ${of("address")}\nits segment keeps ${of("keep")}`, [step]);
    return true;
  });
  $(kind).addEventListener("click", (event) => {
    const box = $(kind).getBoundingClientRect(), at = find(event.clientX - box.left, event.clientY - box.top);
    if (at) go(Math.floor(at[0] / PER));
  });
}
if (MEMORY.length) pointing($("slots"), (x, _, event) => {
  const memory = MEMORY[state.layer], i = Math.floor(((x - 40) / ($("slots").clientWidth - 40)) * memory.slots);
  if (i < 0 || i >= memory.slots) return false;
  const slot = order()[i], t = token(state.step, state.kind), of = (name) => exact(KINDS[name].of(memory, t, slot));
  showTip(event, `Slot ${slot}\nread ${of("address")}, written ${of("written")}\nthis segment keeps ${of("keep")}`);
  return true;
});

// ---- moving ---------------------------------------------------------------------------------

const slider = $("slider");
slider.max = STEPS - 1;
function drawTicks() {
  const canvas = $("ticks"), width = slider.clientWidth, ctx = fit(canvas, width, 7), room = width - 16;
  D.steps.forEach((step, index) => {
    if (!step.differs && !step.recalls.length) return;
    ctx.fillStyle = css(step.differs ? "--bad" : "--accent");
    ctx.fillRect(8 + (STEPS > 1 ? (index * room) / (STEPS - 1) : 0) - 1, step.differs ? 0 : 3, 2.5, step.differs ? 7 : 4);
  });
}

function draw() {
  drawNow(); drawMap(); drawLooks(); drawMemory();
}

function go(step) {
  const before = STRIP[state.step];
  state.step = Math.max(0, Math.min(STEPS - 1, step));
  before?.removeAttribute("aria-current");
  const button = STRIP[state.step];
  button.setAttribute("aria-current", "step");
  const strip = $("strip");
  strip.scrollLeft = button.offsetLeft - strip.offsetLeft - strip.clientWidth / 2 + button.clientWidth / 2;
  slider.value = state.step;
  slider.setAttribute("aria-valuetext", said(state.step));
  const now = D.steps[state.step], readout = $("readout");
  readout.replaceChildren(element("b", `Step ${state.step}`), ` of ${STEPS - 1}: ${D.actions[now.action]}`);
  if (now.differs) readout.append(" ", element("span", `≠ ${D.actions[now.expert]}`, { class: "differs" }));
  // Not at every step of a moving slider: browsers refuse that.
  clearTimeout(state.naming);
  state.naming = setTimeout(() => history.replaceState(null, "", `#step=${state.step}`), 300);
  draw();
}

function play(on) {
  clearInterval(state.playing);
  state.playing = 0;
  if (on) {
    if (state.step === STEPS - 1) go(0);
    state.playing = setInterval(() => { if (state.step + 1 < STEPS) go(state.step + 1); if (state.step === STEPS - 1) play(false); }, Math.max(120, Math.min(700, 20000 / STEPS)));
  }
  $("play").textContent = state.playing ? "❚❚ Pause" : "▶ Play";
  $("play").setAttribute("aria-label", state.playing ? "Pause" : "Play");
}

slider.addEventListener("input", () => { play(false); go(Number(slider.value)); });
$("previous").addEventListener("click", () => { play(false); go(state.step - 1); });
$("next").addEventListener("click", () => { play(false); go(state.step + 1); });
$("play").addEventListener("click", () => play(!state.playing));
$("order").addEventListener("change", (event) => { state.order = event.target.value; drawMemory(); });
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const moves = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: STEPS - 1 };
  if (event.key in moves) { event.preventDefault(); play(false); go(moves[event.key]); }
  else if (event.key === " " && !event.target.matches("button")) { event.preventDefault(); play(!state.playing); }
});

function redraw() { drawTicks(); drawHeads(); drawScales(); draw(); }
dark.addEventListener("change", redraw);
let waiting = 0;
addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); });
addEventListener("hashchange", () => { const at = fromHash(); if (at !== null && at !== state.step) go(at); });
function fromHash() { const found = /^#step=(\d+)$/.exec(location.hash); return found ? Number(found[1]) : null; }

drawTop();
drawStrip();
kindButtons("kinds");
if (MEMORY.length) { $("memory").hidden = false; kindButtons("memory-kinds"); layerButtons(); }
$("attention-intro").textContent = (D.by_segment ? "Each row is a step that looks, each column a step it looks at. Attention ends at segments (dashed); only the memory goes further. " : "Each row is a step that looks, each column a step it looks at. ") + (MEMORY.length ? "The memory’s map shows what a step reads, by the step that wrote it." : "");
$("memory-intro").textContent = MEMORY.length ? (MEMORY[0].reads_after_writing ? "A step reads what its segment has written." : "A step reads the memory as it was before its segment.") + " Reading and writing use the same address." : "";
$("foot").textContent = "Steps are counted from 0. Arrow keys move by a step, Home and End to the ends, space plays. Probabilities are those of acting; attention and memory are of one pass over the finished episode. Made by dtmem inspect.";
redraw();
go(fromHash() ?? D.focus);
})();

"use strict";
// Draws each <figure data-panel> from the JSON of the page, over samples seen, one colour a run:
// {runs: [name], panels: [{title, zero, runs: [null | {line: [samples, values], raw?: [samples, values]}]}]}

const {runs, panels} = JSON.parse(document.querySelector("script[type='application/json']").textContent);
const shown = runs.map(() => true);
let log = false;  // whether charts of positive values have a logarithmic axis
const HEIGHT = 190, LEFT = 50, RIGHT = 12, TOP = 8, BOTTOM = 22, COLOURS = 7;
const END = Math.max(1, ...panels.flatMap(panel => panel.runs.map(series => series ? series.line[0].at(-1) : 0)));
const look = run => `run-${run % COLOURS}${run >= COLOURS ? " dashed" : ""}`;

function add(parent, tag, attributes, text) {
  const space = parent.namespaceURI;
  const element = parent.appendChild(document.createElementNS(space, tag));
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Numbers as people write them: 10k, 1.5M, 0.25, 3e-4.
function si(value, digits = 4) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(digits))}${letter}`;
  }
  if (size === 0 || size >= 1e-3) return String(Number(value.toPrecision(digits)));
  return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
}

// Round numbers from low to high, a step of 1, 2 or 5 apart; on a logarithmic axis 1, 2 and 5 themselves.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(each => each * power >= rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({length: last - first + 1}, (_, place) => (first + place) * step);
}

function logarithmicTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of high / low > 1000 ? [1] : [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found.length > 1 ? found : ticks(low, high, 6);
}

// What is to be seen: all of every line, and of the noise around it all but its rarest peaks.
function range(panel) {
  let low = panel.zero ? 0 : Infinity, high = -Infinity;
  panel.runs.forEach((series, run) => {
    if (!series || !shown[run]) return;
    const noise = [...(series.raw ?? series.line)[1]].sort((a, b) => a - b);
    const rare = series.raw ? Math.floor(noise.length / 50) : 0;
    for (const value of [...series.line[1], noise[rare], noise[noise.length - 1 - rare]]) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  });
  if (high === -Infinity) return {low: 0, high: 1, bent: false};
  if (log && low > 0) return {low: low / (high / low) ** 0.05, high: high * (high / low) ** 0.05, bent: true};
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  return {low: panel.zero ? low : low - room, high: high + room, bent: false};
}

function nearest(samples, at) {
  let low = 0, high = samples.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (samples[middle] < at) low = middle; else high = middle;
  }
  return at - samples[low] <= samples[high] - at ? low : high;
}

function draw(chart) {
  const {figure, panel, svg} = chart, width = svg.clientWidth;
  if (!width) return;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const {low, high, bent} = range(panel), scale = bent ? Math.log : value => value;
  const x = samples => LEFT + samples / END * (width - LEFT - RIGHT);
  const y = value => {
    const share = (scale(value) - scale(low)) / (scale(high) - scale(low));
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
  };
  Object.assign(chart, {x, y});

  for (const value of bent ? logarithmicTicks(low, high) : ticks(low, high, 6)) {
    add(svg, "line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)});
    add(svg, "text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, si(value));
  }
  for (const samples of ticks(0, END, Math.max(2, width / 110))) {
    const anchor = x(samples) > width - 30 ? "end" : "middle";
    add(svg, "text", {x: x(samples), y: HEIGHT - 6, "text-anchor": anchor}, si(samples));
  }
  add(svg, "line", {class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM});

  const clip = add(svg, "clipPath", {id: `clip-${figure.dataset.panel}`});
  add(clip, "rect", {x: LEFT - 4, y: TOP - 4, width: width - LEFT - RIGHT + 8, height: HEIGHT - TOP - BOTTOM + 8});
  const plot = add(svg, "g", {"clip-path": `url(#${clip.id})`});
  const path = ([samples, values], name, run) => add(plot, "path", {
    class: `${name} ${look(run)}`,
    d: samples.map((at, place) => `${place ? "L" : "M"}${x(at).toFixed(1)} ${y(values[place]).toFixed(1)}`).join(""),
  });
  panel.runs.forEach((series, run) => {
    if (series?.raw && shown[run]) path(series.raw, "raw", run);
  });
  panel.runs.forEach((series, run) => {
    if (!series || !shown[run]) return;
    const [samples, values] = series.line;
    path(series.line, "line", run);
    if (samples.length > 30) return;
    samples.forEach((at, place) => add(plot, "circle", {class: look(run), cx: x(at), cy: y(values[place]), r: 2.6}));
  });
  chart.marks = add(svg, "g");
}

// A line and a dot per run at the samples under the pointer, in every chart; their values beside one of them.
function point(chart, samples) {
  chart.marks.replaceChildren();
  if (samples === null) return [];
  const found = chart.panel.runs.flatMap((series, run) => {
    if (!series || !shown[run] || samples > series.line[0].at(-1) * 1.02) return [];
    const place = nearest(series.line[0], samples);
    return [{run, at: series.line[0][place], value: series.line[1][place]}];
  });
  const at = chart.x(samples);
  add(chart.marks, "line", {class: "at", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM});
  for (const {run, at, value} of found) {
    add(chart.marks, "circle", {class: look(run), cx: chart.x(at), cy: chart.y(value), r: 3.5});
  }
  return found;
}

const tip = add(document.body, "div", {class: "tip", hidden: ""});

function hover(chart, event) {
  const box = chart.svg.getBoundingClientRect(), width = box.width - LEFT - RIGHT;
  const samples = Math.min(1, Math.max(0, (event.clientX - box.left - LEFT) / width)) * END;
  for (const other of charts) if (other !== chart && other.marks) point(other, samples);
  const found = point(chart, samples);
  tip.hidden = !found.length;
  tip.replaceChildren();
  add(tip, "div", {class: "quiet"}, `${si(found[0]?.at ?? 0)} samples`);
  for (const {run, value} of found) {
    const row = add(tip, "div");
    add(row, "i", {class: `swatch ${look(run)}`});
    if (runs.length > 1) add(row, "span", {}, runs[run]);
    add(row, "b", {}, si(value));
  }
  const beside = event.clientX + 14 + tip.offsetWidth > innerWidth ? -14 - tip.offsetWidth : 14;
  tip.style.left = `${Math.max(0, event.clientX + beside) + scrollX}px`;
  tip.style.top = `${event.clientY + 14 + scrollY}px`;
}

function leave() {
  tip.hidden = true;
  for (const chart of charts) if (chart.marks) point(chart, null);
}

const charts = [...document.querySelectorAll("figure[data-panel]")].map(figure => {
  const panel = panels[figure.dataset.panel];
  const svg = figure.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  svg.setAttribute("class", "chart");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", panel.title);
  const chart = {figure, panel, svg};
  svg.addEventListener("pointermove", event => hover(chart, event));
  svg.addEventListener("pointerleave", leave);
  new ResizeObserver(() => draw(chart)).observe(svg);
  return chart;
});

document.getElementById("log").addEventListener("click", event => {
  log = !log;
  event.target.setAttribute("aria-pressed", log);
  charts.forEach(draw);
});

for (const button of document.querySelectorAll("button[data-run]")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run);
    shown[run] = !shown[run];
    button.setAttribute("aria-pressed", shown[run]);
    charts.forEach(draw);
  });
}

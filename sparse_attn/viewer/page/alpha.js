// Shows α of every head on an axis, also for a second run if there is one, and curves of α over training for all runs.

const HEAD_COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
const DASHES = ["", "6 3", "2 3"];

function lastOf(run, layer, head) {
  const points = data.courses[run]?.[layer.name]?.[head];
  return points ? points[points.length - 1][1] : null;
}

// Math.min(...numbers) would fail for many numbers: a call accepts only about 100,000 arguments.
function extremes(numbers) {
  let [low, high] = [Infinity, -Infinity];
  for (const number of numbers) [low, high] = [Math.min(low, number), Math.max(high, number)];
  return [low, high];
}

function valuesOf(runs) {
  return runs.flatMap((run) => Object.values(data.courses[run])).flatMap((heads) => Object.values(heads).flat().map((point) => point[1]));
}

function alphaRange() {
  return extremes([1, 2].concat(...data.layers.map((layer) => layer.numbers.alpha || []), valuesOf(data.runs)));
}

function showAlpha() {
  const { runs } = data;
  const withAlpha = data.layers.filter((layer) => layer.numbers.alpha);
  const box = place("alphas");
  if (!withAlpha.length && !runs.length) {
    box.replaceChildren(element("p", { className: "soft empty" }, "No head of this model has an \u03b1."));
    return;
  }
  const kinds = [...new Set(withAlpha.map((layer) => layer.kind))];
  const parts = kinds.map((kind) => strips(kind, withAlpha.filter((layer) => layer.kind === kind), runs[1]));
  if (runs.length) parts.push(courses(runs));
  box.replaceChildren(...parts);
}

// Each layer is a line with a dot per head; the histogram above counts the heads by α.
function strips(kind, layers, otherRun) {
  const [low, high] = alphaRange();
  const width = Math.max(300, Math.min(place("alphas").clientWidth - 32, 980));
  const narrow = width < 560;
  const left = narrow ? 12 : 220;
  const right = 20;
  const strip = narrow ? 44 : 30;
  const top = 92;
  const x = (alpha) => left + ((alpha - low) / (high - low)) * (width - left - right);
  const height = top + layers.length * strip + 34;
  const all = layers.flatMap((layer) => layer.numbers.alpha);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `\u03b1 of every head, ${KIND_NAMES[kind]}` });
  const marks = [[1, "softmax"], [1.5, "1.5"], [2, "sparsemax"]].filter(([alpha]) => alpha >= low && alpha <= high);
  for (const [alpha, name] of marks) {
    picture.append(svg("line", { x1: x(alpha), x2: x(alpha), y1: top - 6, y2: height - 30, class: "axis-mark" }));
    const anchor = x(alpha) > width - 60 ? "end" : x(alpha) < 60 ? "start" : "middle";
    const text = name === "1.5" ? "1.5" : `${alpha} ${name}`;
    picture.append(svg("text", { x: x(alpha), y: height - 12, class: "axis-text", "text-anchor": anchor }, text));
  }
  picture.append(...histogram(all, low, high, x, top - 14));
  layers.forEach((layer, index) => {
    const y = top + index * strip + (narrow ? 28 : strip / 2);
    picture.append(svg("text", { x: narrow ? left : left - 14, y: narrow ? y - 15 : y + 4, class: "strip-name", "text-anchor": narrow ? "start" : "end" }, shortened(layer.name || "attention", narrow ? 40 : 32)));
    picture.append(svg("line", { x1: x(low), x2: x(high), y1: y, y2: y, class: "strip" }));
    const placed = [];
    layer.numbers.alpha.forEach((alpha, head) => {
      const other = otherRun ? lastOf(otherRun, layer, head) : null;
      const dotY = y + offsetOf(placed, x(alpha));
      if (other !== null) {
        picture.append(svg("line", { x1: x(other), x2: x(alpha), y1: dotY, y2: dotY, class: "dumbbell" }));
        picture.append(svg("rect", { x: x(other) - 3.5, y: dotY - 3.5, width: 7, height: 7, transform: `rotate(45 ${x(other)} ${dotY})`, class: "other-dot" }));
      }
      picture.append(dot(layer, head, alpha, other, otherRun, x(alpha), dotY));
    });
  });
  const mean = all.reduce((sum, alpha) => sum + alpha, 0) / all.length;
  const sorted = [...all].sort((a, b) => a - b);
  const median = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
  const caption = `${all.length} head${all.length === 1 ? "" : "s"} \u00b7 mean \u03b1 ${mean.toFixed(3)} \u00b7 median ${median.toFixed(3)}`;
  const legend = otherRun
    ? element("p", { className: "soft" }, element("span", { className: "dot-key" }), ` ${data.runs[0]}  `, element("span", { className: "diamond-key" }), ` ${otherRun}`)
    : null;
  return element("figure", { className: "panel alpha-panel" }, element("figcaption", {}, KIND_NAMES[kind], element("span", { className: "soft" }, ` ${caption}`)), legend || "", picture);
}

// Moves overlapping dots apart.
function offsetOf(placed, x) {
  for (const offset of [0, -7, 7, -12, 12]) {
    if (placed.every((other) => other.offset !== offset || Math.abs(other.x - x) > 9)) {
      placed.push({ x, offset });
      return offset;
    }
  }
  return 0;
}

function dot(layer, head, alpha, other, otherRun, x, y) {
  const index = data.layers.indexOf(layer);
  const made = svg("circle", { cx: x, cy: y, r: 5, class: "dot", tabindex: 0, role: "link" });
  const lines = [`${layer.name || "attention"} \u00b7 head ${head}`, `\u03b1 ${alpha.toFixed(4)}, ${layer.roles[head]}`];
  if (other !== null) lines.push(`${otherRun}: \u03b1 ${other.toFixed(4)}`);
  made.setAttribute("aria-label", lines.join(", "));
  made.dataset.alpha = alpha;
  const open = () => change({ view: "head", layer: index, head, pins: [] });
  made.addEventListener("click", open);
  made.addEventListener("keydown", (event) => event.key === "Enter" && open());
  made.addEventListener("pointermove", (event) => showTip(event.clientX, event.clientY, ...lines));
  made.addEventListener("pointerleave", hideTip);
  made.addEventListener("focus", () => {
    const { left, bottom } = made.getBoundingClientRect();
    showTip(left, bottom, ...lines);
  });
  made.addEventListener("blur", hideTip);
  return made;
}

function histogram(values, low, high, x, bottom) {
  const bins = 40;
  const counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins))]++;
  const most = Math.max(...counts);
  const step = (high - low) / bins;
  return counts.flatMap((count, bin) => {
    if (!count) return [];
    const height = Math.max(3, (58 * count) / most);
    const bar = svg("rect", { x: x(low + bin * step) + 0.5, y: bottom - height, width: Math.max(1, x(low + step) - x(low) - 1), height, class: "bin" });
    bar.append(svg("title", {}, `${count} head${count === 1 ? "" : "s"} with \u03b1 from ${(low + bin * step).toFixed(3)} to ${(low + (bin + 1) * step).toFixed(3)}`));
    return [bar];
  });
}

function courses(runs) {
  const layers = data.layers.filter((layer) => runs.some((run) => data.courses[run][layer.name]));
  const [low, high] = courseRange(runs);
  const heads = Math.max(...layers.map((layer) => layer.roles.length), 0);
  const keys = Array.from({ length: Math.min(heads, HEAD_COLOURS.length * DASHES.length) }, (_, head) => {
    const line = svg("svg", { width: 26, height: 10 }, svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, ...lineStyle(head) }));
    return element("span", { className: "line-key" }, line, ` ${head}`);
  });
  const panels = layers.flatMap((layer) => runs.map((run) => course(layer, run, runs.length > 1, low, high)));
  return element(
    "figure",
    { className: "panel alpha-panel" },
    element("figcaption", {}, "\u03b1 over training", element("span", { className: "soft" }, runs.length > 1 ? ` ${runs.join(" and ")} side by side` : "")),
    element("div", { className: "line-keys" }, "head ", ...keys),
    element("div", { className: "courses", style: `--columns:${columnsFor(runs.length)}` }, ...panels),
  );
}

// One range of α for all panels makes the panels comparable.
function courseRange(runs) {
  const [low, high] = extremes(valuesOf(runs));
  const margin = Math.max(0.02, 0.06 * (high - low), (0.1 - (high - low)) / 2);
  return [low - margin, high + margin];
}

// Returns a few round numbers in a range.
function ticks(low, high) {
  const step = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5].find((size) => (high - low) / size <= 4) ?? high - low;
  const found = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick++) found.push(Number((tick * step).toFixed(2)));
  return found;
}

// Places as many panels side by side as fit; the panels of one layer stay in one line.
function columnsFor(runs) {
  const fitting = Math.max(1, Math.floor((place("alphas").clientWidth - 24) / 250));
  return fitting >= runs ? Math.floor(fitting / runs) * runs : 1;
}

function lineStyle(head) {
  return {
    stroke: `var(${HEAD_COLOURS[head % HEAD_COLOURS.length]})`,
    "stroke-dasharray": DASHES[Math.floor(head / HEAD_COLOURS.length) % DASHES.length],
    "stroke-width": 1.8,
    fill: "none",
  };
}

function course(layer, run, named, low, high) {
  const [width, height, left, bottom] = [300, 150, 34, 20];
  const of = data.courses[run][layer.name] || {};
  const steps = Object.values(of).flatMap((points) => points.map((point) => point[0]));
  const [first, last] = extremes(steps);
  const x = (step) => left + 4 + ((step - first) / (last - first || 1)) * (width - left - 12);
  const y = (alpha) => 8 + (1 - (alpha - low) / (high - low)) * (height - bottom - 14);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `\u03b1 over training, ${layer.name}, ${run}` });
  for (const alpha of ticks(low, high)) {
    picture.append(svg("line", { x1: left, x2: width - 4, y1: y(alpha), y2: y(alpha), class: "strip" }));
    picture.append(svg("text", { x: left - 4, y: y(alpha) + 4, class: "axis-text", "text-anchor": "end" }, String(alpha)));
  }
  if (steps.length) {
    picture.append(svg("text", { x: left + 4, y: height - 5, class: "axis-text" }, first.toLocaleString("en")));
    picture.append(svg("text", { x: width - 4, y: height - 5, class: "axis-text", "text-anchor": "end" }, `step ${last.toLocaleString("en")}`));
  }
  for (const [head, points] of Object.entries(of)) {
    const path = points.map(([step, alpha], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(alpha).toFixed(1)}`).join("");
    const line = svg("path", { d: path, ...lineStyle(Number(head)) });
    line.append(svg("title", {}, `head ${head}: \u03b1 ${points[0][1].toFixed(3)} to ${points[points.length - 1][1].toFixed(3)}`));
    picture.append(line);
    if (points.length === 1) picture.append(svg("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, fill: lineStyle(Number(head)).stroke }));
  }
  return element("figure", { className: "course" }, element("figcaption", {}, shortened(layer.name || "attention", 40), named ? element("span", { className: "soft" }, ` ${run}`) : ""), picture);
}

function startAlpha() {
  onChange((now, before) => {
    if (now.view === "alpha" && (now === before || now.view !== before.view)) showAlpha();
  });
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (state.view !== "alpha" || Math.abs(entry.contentRect.width - width) < 2) return;
    width = entry.contentRect.width;
    showAlpha();
  }).observe(place("view-alpha"));
}

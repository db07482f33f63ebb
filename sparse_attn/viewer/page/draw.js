// Functions that all views use: colours, texts of tokens and numbers, small maps, elements, tooltips.

const TERMS = {
  place: ["layer and head", "the order of the model"],
  alpha: ["\u03b1", "1 is softmax, 2 is sparsemax; between them, a larger \u03b1 is sparser"],
  density: ["density", "share of the visible pairs with non-zero weight; softmax has 1"],
  entropy: ["entropy", "mean entropy of a query's weights, in nats; 0 if one key has all the weight"],
  support: ["keys per query", "mean number of keys with non-zero weight"],
  largest: ["largest weight", "mean over the queries of their largest weight"],
  "weight on own word": ["weight on own word", "mean weight of a subword on the other subwords of its word, in the shown texts"],
  role: ["role", "the pattern that describes the head best"],
};
const KIND_NAMES = { encoder: "encoder", decoder: "decoder", cross: "cross-attention", self: "self-attention" };
const PIN_COLOURS = ["#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b"];

function termName(key) {
  return key in TERMS ? TERMS[key][0] : key;
}

// Replaces characters without a glyph, and characters that change the direction of text, by a symbol or their code point.
function printable(token) {
  if (token === "") return "\u2205";
  const shown = token.replace(/[\u0000-\u0020\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, (char) => {
    const code = char.charCodeAt(0);
    if (code === 0x20) return "\u2423";
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `\u2039U+${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`;
  });
  return /^\p{M}/u.test(shown) ? `\u25cc${shown}` : shown;
}

function shortened(text, length) {
  const chars = Array.from(text);
  return chars.length <= length ? text : `${chars.slice(0, length - 1).join("")}\u2026`;
}

function weightText(weight) {
  if (weight === 0) return "0";
  if (Math.abs(weight) < 0.0001) return weight.toExponential(2);
  return String(Number(weight.toPrecision(4)));
}

function numberText(value) {
  if (value === null || value === undefined) return "\u2013";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toFixed(Math.abs(value) >= 10 ? 1 : 3);
}

function shareText(share) {
  const points = 100 * share;
  if (points >= 99.5 && points < 100) return ">99%";
  if (points > 0 && points < 0.1) return "<0.1%";
  return `${points < 9.95 ? points.toFixed(1) : Math.round(points)}%`;
}

function cssValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

let palette;

function makePalette() {
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const stops = ["--weight-0", "--weight-1", "--weight-2", "--weight-3"].map((name) => rgb(cssValue(name)));
  const ramp = [];
  for (let level = 0; level < 256; level++) {
    const at = (level / 255) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    ramp.push(stops[from].map((channel, i) => Math.round(channel + (stops[from + 1][i] - channel) * (at - from))));
  }
  palette = {
    ramp,
    css: ramp.map((colour) => `rgb(${colour.join(",")})`),
    empty: cssValue("--cell"),
    emptyRgb: rgb(cssValue("--cell")),
    never: cssValue("--never"),
    neverRgb: rgb(cssValue("--never")),
    grid: cssValue("--grid"),
    ink: cssValue("--ink"),
    soft: cssValue("--soft"),
    panel: cssValue("--panel"),
    query: cssValue("--query"),
    key: cssValue("--key"),
    mark: cssValue("--mark"),
  };
}

// The smallest weight also differs in colour from zero; the colour is proportional to the square root of the weight.
function levelOf(weight, largest = 1) {
  return Math.round(255 * Math.sqrt(Math.min(Math.abs(weight) / largest, 1)));
}

function largestInRow(map, row) {
  let largest = 0;
  for (let i = map.start[row]; i < map.start[row + 1]; i++) largest = Math.max(largest, Math.abs(map.weight[i]));
  return largest || 1;
}

// Sets the size of a canvas in CSS pixels, with up to three device pixels in each; returns null if the canvas would have no pixel.
function prepare(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  const [pixelsAcross, pixelsDown] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (pixelsAcross < 1 || pixelsDown < 1) return null;
  if (canvas.width !== pixelsAcross || canvas.height !== pixelsDown) {
    canvas.width = pixelsAcross;
    canvas.height = pixelsDown;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// Draws a whole head with few pixels; each pixel shows the largest weight of its cells.
function thumbnail(canvas, map, across, down) {
  canvas.width = across;
  canvas.height = down;
  const context = canvas.getContext("2d");
  const image = context.createImageData(across, down);
  const largest = pooled(map, across, down, 0, "weight");
  paint(image.data, largest, map, across, down);
  context.putImageData(image, 0, 0);
}

function pooled(map, across, down, threshold, scale) {
  const largest = new Float32Array(across * down);
  for (let row = 0; row < map.rows; row++) {
    const [top, bottom] = span(row, map.rows, down);
    const most = scale === "row" ? largestInRow(map, row) : 1;
    for (let i = map.start[row]; i < map.start[row + 1]; i++) {
      const weight = Math.abs(map.weight[i]);
      if (weight < threshold) continue;
      const [left, right] = span(map.column[i], map.columns, across);
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) {
          const at = y * across + x;
          if (weight / most > largest[at]) largest[at] = weight / most;
        }
      }
    }
  }
  return largest;
}

function paint(pixels, largest, map, across, down) {
  for (let y = 0; y < down; y++) {
    const row = Math.min(Math.floor(((y + 0.5) * map.rows) / down), map.rows - 1);
    const runs = map.mask ? map.mask[row] : [0, map.columns];
    let run = 0;
    for (let x = 0; x < across; x++) {
      const at = y * across + x;
      const column = Math.min(Math.floor(((x + 0.5) * map.columns) / across), map.columns - 1);
      while (run < runs.length && column >= runs[run + 1]) run += 2;
      const seen = run < runs.length && column >= runs[run];
      const colour = largest[at] > 0 ? palette.ramp[levelOf(largest[at])] : seen ? palette.emptyRgb : palette.neverRgb;
      pixels.set([...colour, 255], 4 * at);
    }
  }
}

// The range of pixels of the row or column `index`, if `count` rows or columns share `pixels`: at least one pixel.
function span(index, count, pixels) {
  const from = Math.floor((index * pixels) / count);
  return [from, Math.max(from + 1, Math.floor(((index + 1) * pixels) / count))];
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") made.style.cssText = value;
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function showTip(x, y, ...lines) {
  const tip = place("tip");
  tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, x + 14), window.innerWidth - width - 4);
  const top = y + height + 20 > window.innerHeight ? y - height - 10 : y + 16;
  tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
}

function hideTip() {
  place("tip").hidden = true;
}

function showNotice(text) {
  place("notice").textContent = text;
  place("notice").hidden = !text;
}

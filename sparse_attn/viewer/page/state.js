// The state of the page. The URL contains it, so that a link restores the view.

const place = (id) => document.getElementById(id);
const VIEWS = ["heads", "head", "alpha", "report"];
const MOST_PINS = 6;

const initial = () => ({
  view: "heads",
  layer: 0,
  head: 0,
  example: data.examples[data.first],
  threshold: 0,
  scale: "weight",
  merge: false,
  zoom: 0, // pixels of a cell; 0: the whole matrix
  pins: [],
  sort: "place",
  descending: false,
  kind: "",
  role: "",
  bounded: "",
  low: null,
  high: null,
  table: false,
});

let state = initial();
const watchers = [];

function onChange(watcher) {
  watchers.push(watcher);
}

function change(changes) {
  const before = state;
  state = { ...state, ...changes };
  const moved = state.layer !== before.layer || state.example !== before.example || state.merge !== before.merge;
  if (moved && !("pins" in changes)) state.pins = [];
  writeAddress(state.view !== before.view);
  for (const watcher of watchers) watcher(state, before);
}

function writeAddress(newEntry) {
  const defaults = initial();
  const parts = [];
  const add = (key, value) => parts.push(`${key}=${encodeURIComponent(value)}`);
  if (state.view === "head") {
    add("layer", state.layer);
    add("head", state.head);
  } else if (state.view !== defaults.view) add("view", state.view);
  for (const key of ["example", "threshold", "scale", "zoom", "sort", "kind", "role", "bounded", "low", "high"]) {
    if (state[key] !== defaults[key] && state[key] !== null) add(key, state[key]);
  }
  for (const key of ["merge", "descending", "table"]) if (state[key]) add(key, 1);
  if (state.pins.length) add("pins", state.pins.join(","));
  const address = `#${parts.join("&")}`;
  if (address === location.hash || (address === "#" && !location.hash)) return;
  try {
    history[newEntry ? "pushState" : "replaceState"](null, "", address);
  } catch {
    // A frame inside a notebook has no URL of its own.
  }
}

function within(value, limit, otherwise) {
  const number = Number(value);
  return value !== null && Number.isInteger(number) && number >= 0 && number < limit ? number : otherwise;
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = initial();
  if (!location.hash && data.open) Object.assign(found, { view: "head", ...data.open });
  found.layer = within(given.get("layer"), data.layers.length, found.layer);
  found.head = within(given.get("head"), data.layers[found.layer].roles.length, found.head);
  if (given.has("layer") || given.has("head")) found.view = "head";
  if (VIEWS.includes(given.get("view"))) found.view = given.get("view");
  if (data.examples.includes(Number(given.get("example"))) && given.has("example")) found.example = Number(given.get("example"));
  const threshold = Number(given.get("threshold"));
  if (threshold > 0 && threshold <= 1) found.threshold = threshold;
  if (given.get("scale") === "row") found.scale = "row";
  const zoom = Number(given.get("zoom"));
  if (zoom > 0 && zoom <= LARGEST_CELL) found.zoom = zoom;
  const sizes = data.texts[data.layers[found.layer].maps[exampleIndex(found.example)].queries].tokens.length;
  found.pins = (given.get("pins") || "").split(",").filter(Boolean).map((pin) => within(pin, sizes, -1)).filter((pin) => pin >= 0);
  found.pins = [...new Set(found.pins)].slice(0, MOST_PINS);
  if (sortKeys().includes(given.get("sort"))) found.sort = given.get("sort");
  if (sortKeys().includes(given.get("bounded"))) found.bounded = given.get("bounded");
  for (const key of ["low", "high"]) {
    if (given.get(key) && Number.isFinite(Number(given.get(key)))) found[key] = Number(given.get(key));
  }
  for (const key of ["kind", "role"]) if (choices(key).includes(given.get(key))) found[key] = given.get(key);
  for (const key of ["merge", "descending", "table"]) found[key] = given.get(key) === "1";
  return found;
}

function exampleIndex(example) {
  return data.examples.indexOf(example);
}

function numberKeys() {
  return [...new Set(data.layers.flatMap((layer) => Object.keys(layer.numbers)))];
}

function sortKeys() {
  return ["place", ...numberKeys(), "role"];
}

function choices(key) {
  return [...new Set(data.layers.flatMap((layer) => (key === "kind" ? [layer.kind] : layer.roles)))].sort();
}

// One head: controls, the description of the cell under the pointer, and pinned rows to compare.

let cursor = { row: null, column: null };
let shownMap = null; // the map on display: of subwords, or of whole words
let shownKey = "";
let drawing = 0;

function redraw() {
  if (!drawing) {
    drawing = requestAnimationFrame(() => {
      drawing = 0;
      if (state.view !== "head" || !shownMap) return;
      drawMatrix();
      drawLines();
    });
  }
}

const mergedMaps = new WeakMap();

async function showHead() {
  const { layer, head, example, merge } = state;
  const key = [layer, head, example, merge].join();
  const heads = await loadLayer(layer, exampleIndex(example)).catch(() => null);
  if (!heads || key !== [state.layer, state.head, state.example, state.merge].join()) return;
  const pieces = heads[head];
  place("merge").disabled = !hasPieces(pieces);
  place("merge").title = hasPieces(pieces)
    ? "Sum over the subwords of a key, mean over the subwords of a query (m)"
    : "No token is marked as a subword (##, @@, </w>, \u2581, \u0120)";
  let map = pieces;
  if (merge && hasPieces(pieces)) {
    if (!mergedMaps.has(pieces)) mergedMaps.set(pieces, mergeWords(pieces));
    map = mergedMaps.get(pieces);
  }
  if (map.rows <= Math.max(-1, ...state.pins)) state.pins = state.pins.filter((pin) => pin < map.rows);
  if (shownKey !== key) {
    cursor = { row: null, column: null };
    shownKey = key;
    hideTip();
  }
  shownMap = map;
  showFacts(map);
  layOutMatrix(map);
  layOutLines(map);
  drawMatrix();
  drawLines();
  showPins();
  showReadout();
}

function showFacts(map) {
  const { layer, head } = state;
  const { name, kind, numbers, roles } = data.layers[layer];
  const facts = Object.keys(numbers).map((key) => [
    termName(key),
    key === "density" ? shareText(numbers[key][head]) : numberText(numbers[key][head]),
  ]);
  let visible = 0;
  for (let row = 0; row < map.rows; row++) visible += visibleCount(map, row);
  const entries = map.start[map.rows] - map.start[0];
  facts.push(["role", roles[head]]);
  facts.push(["in this example", `${entries.toLocaleString("en")} of ${visible.toLocaleString("en")} visible pairs have non-zero weight`]);
  facts.push(["size", `${map.rows.toLocaleString("en")} \u00d7 ${map.columns.toLocaleString("en")}`]);
  place("facts").replaceChildren(
    element("span", { className: "fact-name" }, `${name || "attention"} \u00b7 ${KIND_NAMES[kind]} \u00b7 head ${head}`),
    ...facts.map(([title, value]) => element("span", { className: "fact" }, element("i", {}, title), " ", value)),
  );
}

function counted(count, noun) {
  return count === 1 ? `1 ${noun} has` : `${count} ${noun}s have`;
}

function describe(map, { row, column }) {
  const quoted = (token) => `\u201c${printable(token)}\u201d`;
  const query = row === null ? null : `query ${row} ${quoted(map.queries[row])}`;
  const key = column === null ? null : `key ${column} ${quoted(map.keys[column])}`;
  if (query && key) {
    const support = map.start[row + 1] - map.start[row];
    const weight = weightAt(map, row, column);
    const value = entryAt(map, row, column) >= 0
      ? `weight ${weightText(weight)} \u00b7 rank ${rankOf(map, row, weight)} of ${support} keys with weight`
      : isVisible(map, row, column)
        ? `${data.leftOut ? `below ${data.leftOut.below.toPrecision(2)} or 0` : "exactly 0"} \u00b7 ${counted(support, "other key")} weight`
        : "not visible";
    return [`${query} \u2192 ${key}`, value];
  }
  if (query) return [query, `${map.start[row + 1] - map.start[row]} of ${visibleCount(map, row)} visible keys have non-zero weight`];
  if (key) {
    let [count, sum] = [0, 0];
    for (let each = 0; each < map.rows; each++) {
      const entry = entryAt(map, each, column);
      if (entry >= 0) [count, sum] = [count + 1, sum + map.weight[entry]];
    }
    return [key, `${count} of ${map.rows} queries give it weight, ${weightText(sum)} in sum`];
  }
  return [];
}

function showReadout() {
  const readout = place("readout");
  const texts = shownMap ? describe(shownMap, cursor) : [];
  readout.textContent = texts.join(" \u00b7 ") || "Point at a cell or a token.";
  const { row, column } = cursor;
  readout.dataset.weight = row !== null && column !== null ? weightAt(shownMap, row, column) : "";
}

function point(next, event) {
  if (next.row === cursor.row && next.column === cursor.column) {
    if (event && (next.row !== null || next.column !== null)) moveTip(event);
    return;
  }
  cursor = next;
  showReadout();
  redraw();
  if (event && (next.row !== null || next.column !== null)) moveTip(event);
  else hideTip();
}

function moveTip(event) {
  showTip(event.clientX, event.clientY, ...describe(shownMap, cursor));
}

function togglePin(row) {
  if (row === null) return;
  if (state.pins.includes(row)) change({ pins: state.pins.filter((pin) => pin !== row) });
  else if (state.pins.length < MOST_PINS) change({ pins: [...state.pins, row] });
}

const MOST_KEYS_COMPARED = 40;

function showPins() {
  const panel = place("pins");
  panel.hidden = !state.pins.length;
  if (panel.hidden) return;
  const map = shownMap;
  const keys = new Map();
  for (const row of state.pins) {
    for (let i = map.start[row]; i < map.start[row + 1]; i++) {
      const weight = Math.abs(map.weight[i]);
      if (weight >= state.threshold) keys.set(map.column[i], Math.max(keys.get(map.column[i]) || 0, weight));
    }
  }
  const heaviest = [...keys].sort((a, b) => b[1] - a[1]).slice(0, MOST_KEYS_COMPARED).map(([key]) => key);
  heaviest.sort((a, b) => a - b);
  const header = state.pins.map((row, index) => {
    const button = element("button", { type: "button", title: "unpin this row", className: "pin" }, `${row} ${shortened(printable(map.queries[row]), 18)} \u00d7`);
    button.style.color = PIN_COLOURS[index];
    button.addEventListener("click", () => togglePin(row));
    const support = map.start[row + 1] - map.start[row];
    return element("th", {}, button, element("div", { className: "soft" }, `${counted(support, "key")} weight`));
  });
  const body = heaviest.map((column) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, `${column} ${shortened(printable(map.keys[column]), 24)}`),
      ...state.pins.map((row, index) => {
        const weight = weightAt(map, row, column);
        if (entryAt(map, row, column) < 0) return element("td", { className: "soft" }, isVisible(map, row, column) ? "0" : "");
        const bar = element("span", { className: "bar-weight", style: `width:${Math.min(1, Math.abs(weight)) * 100}%;background:${PIN_COLOURS[index]}` });
        return element("td", {}, element("span", { className: "bar-box" }, bar), element("span", { className: "bar-text" }, `${weightText(weight)} `, element("i", {}, `#${rankOf(map, row, weight)}`)));
      }),
    ),
  );
  const more = keys.size - heaviest.length;
  panel.replaceChildren(
    element("h3", {}, "pinned rows", element("span", { className: "soft" }, ` weight and rank of each key${sharedText(map)}`)),
    element("div", { className: "wide" }, element("table", { className: "compare" }, element("thead", {}, element("tr", {}, element("th", {}, "key"), ...header)), element("tbody", {}, ...body))),
    ...(more > 0 ? [element("p", { className: "soft" }, `and ${more.toLocaleString("en")} keys with smaller weights`)] : []),
  );
}

function sharedText(map) {
  if (state.pins.length < 2) return "";
  let shared = 0;
  const [first, ...others] = state.pins;
  for (let i = map.start[first]; i < map.start[first + 1]; i++) {
    if (others.every((row) => entryAt(map, row, map.column[i]) >= 0)) shared++;
  }
  return `; ${counted(shared, "key")} weight in all of them`;
}

// Position 0 of the slider means no threshold. The positions from 1 to 100 are thresholds from about 0.0001 to 1, on a
// logarithmic scale.
function thresholdOf(position) {
  return position === 0 ? 0 : Number((10 ** (-4 + (4 * position) / 100)).toPrecision(3));
}

function positionOf(threshold) {
  return threshold === 0 ? 0 : Math.max(1, Math.round((100 * (Math.log10(threshold) + 4)) / 4));
}

function stepHead(step) {
  const flat = allHeads();
  const at = flat.findIndex((entry) => entry.layer === state.layer && entry.head === state.head);
  const next = flat[(at + step + flat.length) % flat.length];
  change({ layer: next.layer, head: next.head, pins: state.pins });
}

function stepLayer(step) {
  const layer = (state.layer + step + data.layers.length) % data.layers.length;
  change({ layer, head: Math.min(state.head, data.layers[layer].roles.length - 1) });
}

function saveCsv() {
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  const rows = ["query,query_token,key,key_token,weight"];
  const map = shownMap;
  for (let row = 0; row < map.rows; row++) {
    for (let i = map.start[row]; i < map.start[row + 1]; i++) {
      if (Math.abs(map.weight[i]) < state.threshold) continue;
      rows.push([row, quoted(map.queries[row]), map.column[i], quoted(map.keys[map.column[i]]), map.weight[i]].join(","));
    }
  }
  const link = element("a", {
    href: URL.createObjectURL(new Blob([rows.join("\n"), "\n"], { type: "text/csv" })),
    download: `layer${state.layer}-head${state.head}.csv`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function startHead() {
  fillSelect(place("layer"), data.layers.map((layer, index) => [index, layer.name || "attention"]));
  place("layer").addEventListener("change", () => {
    const layer = Number(place("layer").value);
    change({ layer, head: Math.min(state.head, data.layers[layer].roles.length - 1) });
  });
  place("head").addEventListener("change", () => change({ head: Number(place("head").value), pins: state.pins }));
  place("previous").addEventListener("click", () => stepHead(-1));
  place("next").addEventListener("click", () => stepHead(1));
  place("threshold").addEventListener("input", () => change({ threshold: thresholdOf(Number(place("threshold").value)) }));
  place("scale").addEventListener("change", () => change({ scale: place("scale").value }));
  place("merge").addEventListener("click", () => change({ merge: !state.merge }));
  place("smaller").addEventListener("click", () => zoomBy(-1));
  place("larger").addEventListener("click", () => zoomBy(1));
  place("fit").addEventListener("click", () => change({ zoom: 0 }));
  place("csv").addEventListener("click", saveCsv);

  const box = place("matrix");
  box.addEventListener("scroll", redraw, { passive: true });
  box.addEventListener("pointermove", (event) => point(cellAt(event), event));
  box.addEventListener("pointerleave", () => point({ row: null, column: null }));
  box.addEventListener("click", (event) => {
    point(cellAt(event), event);
    togglePin(cursor.row);
  });
  box.addEventListener("keydown", moveCursor);
  const columns = place("lines");
  columns.addEventListener("scroll", redraw, { passive: true });
  columns.addEventListener("pointermove", (event) => point(tokenAt(event), event));
  columns.addEventListener("pointerleave", () => point({ row: null, column: null }));
  columns.addEventListener("click", (event) => togglePin(tokenAt(event).row));
  new ResizeObserver(() => {
    if (state.view === "head" && shownMap) {
      layOutMatrix(shownMap);
      layOutLines(shownMap);
      redraw();
    }
  }).observe(place("view-head"));

  onChange((now, before) => {
    if (now === before || now.layer !== before.layer) {
      fillSelect(place("head"), data.layers[now.layer].roles.map((role, head) => [head, String(head)]));
    }
    place("layer").value = now.layer;
    place("head").value = now.head;
    place("scale").value = now.scale;
    place("merge").setAttribute("aria-pressed", now.merge);
    if (thresholdOf(Number(place("threshold").value)) !== now.threshold) place("threshold").value = positionOf(now.threshold);
    place("threshold-value").value = now.threshold ? weightText(now.threshold) : "0";
    if (now.view === "head") showHead();
  });
}

function moveCursor(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Enter") togglePin(cursor.row);
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  event.stopPropagation();
  const [down, right] = steps[event.key];
  const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
  const started = cursor.row !== null && cursor.column !== null;
  const row = started ? clamp(cursor.row + down, shownMap.rows) : cursor.row ?? 0;
  const column = started ? clamp(cursor.column + right, shownMap.columns) : cursor.column ?? 0;
  reveal(row, column);
  point({ row, column });
}

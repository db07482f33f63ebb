// Tokens in two columns, and a line for each weight of the queries in sight.

const LINE_HEIGHT = 20;
const MOST_LINES = 4000;
const lines = { map: null, side: 120 };

function layOutLines(map) {
  const box = place("lines");
  lines.map = map;
  lines.queries = map.queries.map((token) => shortened(printable(token), 18));
  lines.keys = map.keys.map((token) => shortened(printable(token), 18));
  lines.side = Math.min(textWidth([...lines.queries, ...lines.keys], 130) + 16, box.clientWidth * 0.36);
  const height = Math.max(map.rows, map.columns) * LINE_HEIGHT + 8;
  const room = Math.max(260, Math.min(window.innerHeight * 0.72, 760));
  box.firstElementChild.style.height = `${height}px`;
  box.style.height = `${Math.min(height, room)}px`;
}

function drawLines() {
  const { map, side } = lines;
  const box = place("lines");
  if (!map || !box.clientWidth) return;
  const [width, height] = [box.clientWidth, box.clientHeight];
  const context = prepare(box.querySelector("canvas"), width, height);
  if (!context) return;
  const y = (index) => 4 + (index + 0.5) * LINE_HEIGHT - box.scrollTop;
  const first = Math.max(0, Math.floor((box.scrollTop - 4) / LINE_HEIGHT));
  const last = Math.ceil((box.scrollTop + height) / LINE_HEIGHT);
  const rowsInSight = [first, Math.min(last, map.rows)];
  const [from, to] = [side, width - side];
  const { drawn, hidden } = linesInSight(map, ...rowsInSight);
  const busy = cursor.row !== null || cursor.column !== null || state.pins.length > 0;
  context.lineCap = "round";
  for (const { row, column, weight, colour } of drawn) {
    const strength = Math.sqrt(Math.min(Math.abs(weight), 1));
    context.globalAlpha = busy && !colour ? 0.06 : 0.12 + 0.88 * strength;
    context.strokeStyle = colour || palette.query;
    context.lineWidth = 0.6 + 2.9 * strength;
    const middle = (from + to) / 2;
    context.beginPath();
    context.moveTo(from, y(row));
    context.bezierCurveTo(middle, y(row), middle, y(column), to, y(column));
    context.stroke();
  }
  context.globalAlpha = 1;
  context.textBaseline = "middle";
  for (let row = rowsInSight[0]; row < rowsInSight[1]; row++) {
    const pin = state.pins.indexOf(row);
    const here = row === cursor.row;
    context.font = here || pin >= 0 ? `bold ${FONT}` : FONT;
    context.fillStyle = pin >= 0 ? PIN_COLOURS[pin] : here ? palette.query : palette.ink;
    context.textAlign = "right";
    context.fillText(lines.queries[row], from - 7, y(row), from - 10);
  }
  const focus = cursor.row ?? (state.pins.length ? state.pins[state.pins.length - 1] : null);
  for (let column = first; column < Math.min(last, map.columns); column++) {
    const here = column === cursor.column;
    const weight = focus === null ? 0 : weightAt(map, focus, column);
    if (focus !== null && Math.abs(weight) >= state.threshold && weight !== 0) {
      context.fillStyle = cursor.row === null ? PIN_COLOURS[state.pins.length - 1] : palette.query;
      context.globalAlpha = 0.16 + 0.5 * Math.sqrt(Math.min(Math.abs(weight), 1));
      context.fillRect(to + 4, y(column) - LINE_HEIGHT / 2 + 1, (side - 8) * Math.min(Math.abs(weight), 1) + 2, LINE_HEIGHT - 2);
      context.globalAlpha = 1;
    }
    context.font = here ? `bold ${FONT}` : FONT;
    context.fillStyle = here ? palette.key : palette.ink;
    context.textAlign = "left";
    context.fillText(lines.keys[column], to + 7, y(column), side - 10);
  }
  place("lines-note").textContent = hidden
    ? `${drawn.length.toLocaleString("en")} lines are drawn, the heaviest of the queries in sight; ${hidden.toLocaleString("en")} lighter ones are not.`
    : "";
}

// Lines from the visible queries, and all lines to the key under the pointer; larger weights are drawn later, coloured lines last.
function linesInSight(map, first, last) {
  const found = [];
  const add = (row, entry) => {
    const [column, weight] = [map.column[entry], map.weight[entry]];
    if (Math.abs(weight) < state.threshold) return;
    const pin = state.pins.indexOf(row);
    const here = row === cursor.row || (cursor.row === null && column === cursor.column);
    const colour = pin >= 0 ? PIN_COLOURS[pin] : here ? (column === cursor.column ? palette.key : palette.query) : null;
    found.push({ row, column, weight, colour });
  };
  for (let row = first; row < last; row++) for (let i = map.start[row]; i < map.start[row + 1]; i++) add(row, i);
  const outside = (row) => row < first || row >= last;
  if (cursor.row === null && cursor.column !== null) {
    for (let row = 0; row < map.rows; row++) {
      const entry = outside(row) ? entryAt(map, row, cursor.column) : -1;
      if (entry >= 0) add(row, entry);
    }
  }
  const importance = (line) => Math.abs(line.weight) + (line.colour ? 2 : 0);
  found.sort((a, b) => importance(b) - importance(a));
  const drawn = found.slice(0, MOST_LINES).reverse();
  return { drawn, hidden: found.length - drawn.length };
}

function tokenAt(event) {
  const { map, side } = lines;
  const box = place("lines");
  const bounds = box.getBoundingClientRect();
  const x = event.clientX - bounds.left;
  const index = Math.floor((event.clientY - bounds.top - 4 + box.scrollTop) / LINE_HEIGHT);
  if (map && index >= 0 && x <= side && index < map.rows) return { row: index, column: null };
  if (map && index >= 0 && x >= box.clientWidth - side && index < map.columns) return { row: null, column: index };
  return { row: null, column: null };
}

// The matrix of one head. If cells have two pixels or more, only the visible part is drawn, so that long inputs are not slower.

const LARGEST_CELL = 60;
const LARGEST_FITTING = 40;
const ZOOMS = [0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 26, 32, 40, 50, LARGEST_CELL];
const SMALLEST_LABELLED = 10;
const FONT = fontOf(12);

function fontOf(pixels) {
  return `${pixels}px system-ui, sans-serif`;
}

const matrix = { map: null, cell: 1, left: 40, top: 40 };

function textWidth(texts, most) {
  const context = place("matrix").querySelector("canvas").getContext("2d");
  context.font = FONT;
  let widest = 0;
  for (const text of texts.slice(0, 4000)) {
    if (text.length * 13 > widest) widest = Math.max(widest, context.measureText(text).width);
    if (widest >= most) return most;
  }
  return Math.ceil(widest);
}

function layOutMatrix(map) {
  const box = place("matrix");
  matrix.map = map;
  matrix.rowNames = map.queries.map((token) => shortened(printable(token), 18));
  matrix.columnNames = map.keys.map((token) => shortened(printable(token), 18));
  const narrow = box.clientWidth < 480;
  const rowWidth = textWidth(matrix.rowNames, narrow ? 76 : 120) + 12;
  const columnWidth = textWidth(matrix.columnNames, narrow ? 76 : 110) + 12;
  const room = Math.max(260, Math.min(window.innerHeight * 0.72, 760));
  const fitting = (left, top) => Math.min((box.clientWidth - left - 2) / map.columns, (room - top - 2) / map.rows, LARGEST_FITTING);
  const labelled = (state.zoom || fitting(rowWidth, columnWidth)) >= SMALLEST_LABELLED;
  matrix.left = labelled ? rowWidth : 42;
  matrix.top = labelled ? columnWidth : 26;
  matrix.cell = state.zoom || fitting(matrix.left, matrix.top);
  const [width, height] = [matrix.left + matrix.cell * map.columns + 1, matrix.top + matrix.cell * map.rows + 1];
  const spacer = box.firstElementChild;
  spacer.style.width = `${width}px`;
  spacer.style.height = `${height}px`;
  box.style.height = `${Math.ceil(Math.min(height, room)) + (width > box.clientWidth ? 16 : 0)}px`;
  showLegend();
}

function drawMatrix() {
  const { map, cell, left, top } = matrix;
  const box = place("matrix");
  if (!map || !box.clientWidth) return;
  const [width, height] = [box.clientWidth, box.clientHeight];
  const context = prepare(box.querySelector("canvas"), width, height);
  if (!context) return;
  const [x0, y0] = [left - box.scrollLeft, top - box.scrollTop];
  const firstRow = Math.max(0, Math.floor((top - y0) / cell));
  const lastRow = Math.min(map.rows, Math.ceil((height - y0) / cell));
  const firstColumn = Math.max(0, Math.floor((left - x0) / cell));
  const lastColumn = Math.min(map.columns, Math.ceil((width - x0) / cell));
  const right = Math.min(width, x0 + cell * map.columns);
  const bottom = Math.min(height, y0 + cell * map.rows);
  context.save();
  context.beginPath();
  context.rect(left, top, right - left, bottom - top);
  context.clip();
  if (cell < 2) drawPooled(context, x0, y0, [left, top, right, bottom]);
  else drawCells(context, x0, y0, firstRow, lastRow, firstColumn, lastColumn);
  drawMarks(context, x0, y0);
  context.restore();
  context.strokeStyle = palette.grid;
  context.strokeRect(left - 0.5, top - 0.5, right - left + 1, bottom - top + 1);
  drawNames(context, x0, y0, firstRow, lastRow, firstColumn, lastColumn, width, height);
}

function drawCells(context, x0, y0, firstRow, lastRow, firstColumn, lastColumn) {
  const { map, cell } = matrix;
  const gap = cell >= 7 ? 1 : 0;
  context.fillStyle = palette.empty;
  context.fillRect(x0 + firstColumn * cell, y0 + firstRow * cell, (lastColumn - firstColumn) * cell, (lastRow - firstRow) * cell);
  for (let row = firstRow; row < lastRow; row++) {
    const y = y0 + row * cell;
    if (map.mask) {
      context.fillStyle = hatch(context);
      let from = 0;
      for (const [start, end] of [...pairs(map.mask[row]), [map.columns, map.columns]]) {
        if (start > from) context.fillRect(x0 + from * cell, y, (start - from) * cell, cell);
        from = end;
      }
    }
    const most = state.scale === "row" ? largestInRow(map, row) : 1;
    for (let i = lowerBound(map, row, firstColumn); i < map.start[row + 1] && map.column[i] < lastColumn; i++) {
      if (Math.abs(map.weight[i]) < state.threshold) continue;
      context.fillStyle = palette.css[levelOf(map.weight[i], most)];
      context.fillRect(x0 + map.column[i] * cell, y, cell - gap, cell - gap);
    }
  }
}

function pairs(runs) {
  const found = [];
  for (let i = 0; i < runs.length; i += 2) found.push([runs[i], runs[i + 1]]);
  return found;
}

function lowerBound(map, row, column) {
  let [low, high] = [map.start[row], map.start[row + 1]];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (map.column[middle] < column) low = middle + 1;
    else high = middle;
  }
  return low;
}

let hatching = null;

function hatch(context) {
  if (hatching && hatching.colour === palette.never + palette.cell) return hatching.pattern;
  const tile = element("canvas", { width: 6, height: 6 });
  const drawing = tile.getContext("2d");
  drawing.fillStyle = palette.empty;
  drawing.fillRect(0, 0, 6, 6);
  drawing.strokeStyle = palette.never;
  drawing.lineWidth = 2;
  for (const shift of [-6, 0, 6]) {
    drawing.beginPath();
    drawing.moveTo(shift - 1, 7);
    drawing.lineTo(shift + 7, -1);
    drawing.stroke();
  }
  hatching = { colour: palette.never + palette.cell, pattern: context.createPattern(tile, "repeat") };
  return hatching.pattern;
}

const pooledWhole = { key: "" };

// Where cells are smaller than two pixels, each pixel shows the largest weight that falls into it.
function drawPooled(context, x0, y0, [left, top, right, bottom]) {
  const { map, cell } = matrix;
  const [across, down] = [Math.max(1, Math.round(map.columns * cell)), Math.max(1, Math.round(map.rows * cell))];
  const key = [across, down, state.threshold, state.scale, document.documentElement.dataset.theme, palette.empty].join();
  if (pooledWhole.key !== key || pooledWhole.map !== map) {
    const canvas = element("canvas", { width: across, height: down });
    const image = canvas.getContext("2d").createImageData(across, down);
    paint(image.data, pooled(map, across, down, state.threshold, state.scale), map, across, down);
    canvas.getContext("2d").putImageData(image, 0, 0);
    Object.assign(pooledWhole, { key, map, canvas });
  }
  context.imageSmoothingEnabled = false;
  context.drawImage(pooledWhole.canvas, left - x0, top - y0, right - left, bottom - top, left, top, right - left, bottom - top);
}

function drawMarks(context, x0, y0) {
  const { map, cell } = matrix;
  const size = Math.max(cell, 2);
  context.lineWidth = 2;
  state.pins.forEach((row, index) => {
    context.strokeStyle = PIN_COLOURS[index];
    context.strokeRect(x0 + 1, y0 + row * cell, map.columns * cell - 2, size);
  });
  const { row, column } = cursor;
  context.lineWidth = 1.5;
  context.strokeStyle = palette.mark;
  if (row !== null) context.strokeRect(x0, y0 + row * cell, map.columns * cell, size);
  if (column !== null) context.strokeRect(x0 + column * cell, y0, size, map.rows * cell);
}

function drawNames(context, x0, y0, firstRow, lastRow, firstColumn, lastColumn, width, height) {
  const { map, cell, left, top } = matrix;
  const named = cell >= SMALLEST_LABELLED;
  const font = fontOf(named ? Math.min(12, cell) : 12);
  context.textBaseline = "middle";
  const every = named ? 1 : stepOf(34 / cell);
  const rowText = (row) => (named ? matrix.rowNames[row] : String(row));
  const columnText = (column) => (named ? matrix.columnNames[column] : String(column));
  context.save();
  context.beginPath();
  context.rect(0, top, left, height - top);
  context.clip();
  context.textAlign = "right";
  for (let row = Math.ceil(firstRow / every) * every; row < lastRow; row += every) {
    const pin = state.pins.indexOf(row);
    const here = row === cursor.row;
    context.fillStyle = pin >= 0 ? PIN_COLOURS[pin] : here ? palette.query : palette.soft;
    context.font = here || pin >= 0 ? `bold ${font}` : font;
    context.fillText(rowText(row), left - 6, y0 + (row + 0.5) * cell, left - 8);
  }
  context.restore();
  context.save();
  context.beginPath();
  context.rect(left, 0, width - left, top);
  context.clip();
  for (let column = Math.ceil(firstColumn / every) * every; column < lastColumn; column += every) {
    const here = column === cursor.column;
    context.fillStyle = here ? palette.key : palette.soft;
    context.font = here ? `bold ${font}` : font;
    context.save();
    context.translate(x0 + (column + 0.5) * cell, top - 6);
    if (named) context.rotate(-Math.PI / 2);
    context.textAlign = named ? "left" : column === 0 ? "left" : "center";
    context.fillText(columnText(column), 0, named ? 0 : -6, named ? top - 8 : 60);
    context.restore();
  }
  context.restore();
}

// The smallest number that is not below `atLeast`, among 1, 2 and 5 times the powers of ten from 1 on.
function stepOf(atLeast) {
  const power = 10 ** Math.floor(Math.log10(atLeast));
  return Math.max(1, [1, 2, 5, 10].find((factor) => factor * power >= atLeast) * power);
}

function cellAt(event) {
  const { map, cell, left, top } = matrix;
  const box = place("matrix");
  const bounds = box.getBoundingClientRect();
  const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
  if (!map || x >= box.clientWidth || y >= box.clientHeight) return { row: null, column: null };
  const row = y < top ? null : Math.floor((y - top + box.scrollTop) / cell);
  const column = x < left ? null : Math.floor((x - left + box.scrollLeft) / cell);
  if ((row !== null && row >= map.rows) || (column !== null && column >= map.columns)) return { row: null, column: null };
  return { row, column };
}

function reveal(row, column) {
  const { cell, left, top } = matrix;
  const box = place("matrix");
  const [x, y] = [column * cell, row * cell];
  if (x < box.scrollLeft) box.scrollLeft = x;
  else if (x + cell > box.scrollLeft + box.clientWidth - left) box.scrollLeft = x + cell - box.clientWidth + left + 1;
  if (y < box.scrollTop) box.scrollTop = y;
  else if (y + cell > box.scrollTop + box.clientHeight - top) box.scrollTop = y + cell - box.clientHeight + top + 1;
}

function zoomBy(direction) {
  const now = matrix.cell;
  const next = direction > 0 ? ZOOMS.find((zoom) => zoom > now + 1e-6) : ZOOMS.findLast((zoom) => zoom < now - 1e-6);
  if (next) change({ zoom: next });
}

function showLegend() {
  const gradient = [0, 0.25, 0.5, 0.75, 1].map((share) => `${palette.css[Math.round(255 * share)]} ${100 * share}%`).join(",");
  const bar = element("span", { className: "ramp", style: `background:linear-gradient(90deg,${gradient})` });
  const labels = ["0+", "0.06", "0.25", "0.56", "1"].map((text) => element("span", {}, text));
  const parts = [
    element("span", { className: "swatch zero" }),
    state.threshold || data.leftOut ? "0 or not shown" : "exactly 0",
    element("span", { className: "ramp-box" }, bar, element("span", { className: "ramp-labels" }, ...labels)),
  ];
  if (matrix.map.mask) parts.push(element("span", { className: "swatch never" }), "never visible");
  place("legend").replaceChildren(...parts);
}

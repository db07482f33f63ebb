// Reads the output of encode.py: weights as their non-zero entries, masks as runs.

const data = JSON.parse(document.getElementById("data").textContent);

const halfValues = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    table[bits] = bits & 32768 ? -size : size;
  }
  return table;
})();

async function inflate(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Reads whole numbers of one byte each; if the byte is 255, the next byte is added to the number.
function wholeNumbers(bytes, begin, end) {
  const numbers = [];
  let number = 0;
  for (let i = begin; i < end; i++) {
    number += bytes[i];
    if (bytes[i] < 255) {
      numbers.push(number);
      number = 0;
    }
  }
  return numbers;
}

// Finds the index of an entry in the map of one head, or returns -1. The entries of row `r` have the indices from
// start[r] to start[r + 1] - 1, in the order of their columns.
function entryAt(map, row, column) {
  let low = map.start[row];
  let high = map.start[row + 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (map.column[middle] < column) low = middle + 1;
    else high = middle;
  }
  return low < map.start[row + 1] && map.column[low] === column ? low : -1;
}

function weightAt(map, row, column) {
  const entry = entryAt(map, row, column);
  return entry < 0 ? 0 : map.weight[entry];
}

// The rank of a weight in its row: 1 for the largest; equal weights share a rank.
function rankOf(map, row, weight) {
  let rank = 1;
  for (let i = map.start[row]; i < map.start[row + 1]; i++) if (map.weight[i] > weight) rank++;
  return rank;
}

const loadedMaps = new Map();

function loadLayer(layer, place) {
  const described = data.layers[layer].maps[place];
  if (!loadedMaps.has(described.id)) {
    const loading = decodeLayer(described, data.layers[layer].roles.length);
    loading.catch((error) => showNotice(`The weights of ${data.layers[layer].name} cannot be read: ${error.message}`));
    loadedMaps.set(described.id, loading);
  }
  return loadedMaps.get(described.id);
}

async function decodeLayer(described, heads) {
  const bytes = await inflate(document.getElementById(described.id).textContent);
  const [countBytes, distanceBytes] = described.sizes;
  const rows = data.texts[described.queries].tokens.length;
  const columns = data.texts[described.keys].tokens.length;
  const counts = wholeNumbers(bytes, 0, countBytes);
  const start = new Int32Array(heads * rows + 1);
  for (let row = 0; row < heads * rows; row++) start[row + 1] = start[row] + counts[row];
  const column = new Int32Array(described.entries);
  let at = countBytes;
  for (let row = 0; row < heads * rows; row++) {
    let previous = -1;
    for (let i = start[row]; i < start[row + 1]; i++) {
      let distance = 0;
      while (bytes[at] === 255) distance += bytes[at++];
      distance += bytes[at++];
      previous += distance + 1;
      column[i] = previous;
    }
  }
  const weight = new Float32Array(described.entries);
  const high = countBytes + distanceBytes;
  const low = high + described.entries;
  for (let i = 0; i < described.entries; i++) weight[i] = halfValues[(bytes[high + i] << 8) | bytes[low + i]];
  const mask = await loadMask(described.mask, rows, columns);
  const sides = { rows, columns, mask, queries: data.texts[described.queries].tokens, keys: data.texts[described.keys].tokens };
  const words = { queries: data.texts[described.queries].words, keys: data.texts[described.keys].words };
  return Array.from({ length: heads }, (_, head) => ({
    ...sides,
    words,
    start: start.subarray(head * rows, (head + 1) * rows + 1),
    column,
    weight,
  }));
}

const loadedMasks = new Map();

// The limits of the visible runs of each row: [from, to, from, to, ...]; null if all pairs are visible.
function loadMask(number, rows, columns) {
  if (number === null) return null;
  if (!loadedMasks.has(number)) loadedMasks.set(number, decodeMask(data.masks[number], rows, columns));
  return loadedMasks.get(number);
}

async function decodeMask(text, rows, columns) {
  const bytes = await inflate(text);
  const runs = Array.from({ length: rows }, () => []);
  let at = 0;
  wholeNumbers(bytes, 0, bytes.length).forEach((length, index) => {
    const end = at + length;
    while (index % 2 && at < end) {
      const row = Math.floor(at / columns);
      const stop = Math.min(end, (row + 1) * columns);
      runs[row].push(at - row * columns, stop - row * columns);
      at = stop;
    }
    at = end;
  });
  return runs;
}

function visibleCount(map, row) {
  if (!map.mask) return map.columns;
  let count = 0;
  for (let i = 0; i < map.mask[row].length; i += 2) count += map.mask[row][i + 1] - map.mask[row][i];
  return count;
}

function isVisible(map, row, column) {
  if (!map.mask) return true;
  const runs = map.mask[row];
  for (let i = 0; i < runs.length; i += 2) if (column >= runs[i] && column < runs[i + 1]) return true;
  return false;
}

function hasPieces(map) {
  const last = (words) => (words.length ? words[words.length - 1] + 1 : 0);
  return last(map.words.queries) < map.rows || last(map.words.keys) < map.columns;
}

// Attention between words: summed over the subwords of a key, averaged over the subwords of a query.
function mergeWords(map) {
  const members = (words) => {
    const groups = [];
    words.forEach((word, token) => (groups[word] ||= []).push(token));
    return groups;
  };
  const queryGroups = members(map.words.queries);
  const keyGroups = members(map.words.keys);
  const text = (tokens, group) => group.map((token) => tokens[token]).join("");
  const start = new Int32Array(queryGroups.length + 1);
  const column = [];
  const weight = [];
  queryGroups.forEach((group, word) => {
    const sums = new Map();
    for (const row of group) {
      for (let i = map.start[row]; i < map.start[row + 1]; i++) {
        const key = map.words.keys[map.column[i]];
        sums.set(key, (sums.get(key) || 0) + map.weight[i]);
      }
    }
    for (const key of [...sums.keys()].sort((a, b) => a - b)) {
      column.push(key);
      weight.push(sums.get(key) / group.length);
    }
    start[word + 1] = column.length;
  });
  const mask = map.mask && queryGroups.map((group) => {
    const seen = new Set();
    for (const row of group) {
      const runs = map.mask[row];
      for (let i = 0; i < runs.length; i += 2) for (let c = runs[i]; c < runs[i + 1]; c++) seen.add(map.words.keys[c]);
    }
    return [...seen].sort((a, b) => a - b).flatMap((key) => [key, key + 1]);
  });
  return {
    rows: queryGroups.length,
    columns: keyGroups.length,
    queries: queryGroups.map((group) => text(map.queries, group)),
    keys: keyGroups.map((group) => text(map.keys, group)),
    mask,
    start,
    column: Int32Array.from(column),
    weight: Float32Array.from(weight),
  };
}

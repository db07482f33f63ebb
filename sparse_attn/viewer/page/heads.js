// All heads, each as a small map or as a table row; any statistic can sort and filter them.

function allHeads() {
  return data.layers.flatMap((layer, index) => layer.roles.map((role, head) => ({ layer: index, head, role })));
}

function valueOf(entry, key) {
  if (key === "role") return entry.role;
  const values = data.layers[entry.layer].numbers[key];
  return values ? values[entry.head] : null;
}

function chosenHeads() {
  const { kind, role, bounded, low, high, sort, descending } = state;
  const kept = allHeads().filter((entry) => {
    if (kind && data.layers[entry.layer].kind !== kind) return false;
    if (role && entry.role !== role) return false;
    if (!bounded) return true;
    const value = valueOf(entry, bounded);
    return value !== null && (low === null || value >= low) && (high === null || value <= high);
  });
  const sign = descending ? -1 : 1;
  if (sort === "place") return descending ? kept.reverse() : kept;
  return kept.sort((a, b) => {
    const [x, y] = [valueOf(a, sort), valueOf(b, sort)];
    if (x === y) return 0;
    if (x === null || y === null) return x === null ? 1 : -1; // heads without this statistic come last
    return sign * (x < y ? -1 : 1);
  });
}

function headLabel(entry) {
  return `${data.layers[entry.layer].name || "attention"} \u00b7 head ${entry.head}`;
}

const MOST_PIXELS = 96; // largest width and height of a small map

const thumbnails = new IntersectionObserver(
  (seen) => {
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      thumbnails.unobserve(target);
      loadLayer(Number(target.dataset.layer), exampleIndex(state.example)).then((heads) => {
        const map = heads[Number(target.dataset.head)];
        thumbnail(target, map, Math.min(map.columns, MOST_PIXELS), Math.min(map.rows, MOST_PIXELS));
      }, () => {});
    }
  },
  { rootMargin: "300px" },
);

function card(entry) {
  const numbers = data.layers[entry.layer].numbers;
  const canvas = element("canvas", { width: 1, height: 1 });
  canvas.dataset.layer = entry.layer;
  canvas.dataset.head = entry.head;
  const texts = [];
  if (numbers.alpha) texts.push(`\u03b1 ${numbers.alpha[entry.head].toFixed(2)}`);
  texts.push(shareText(numbers.density[entry.head]));
  const { sort } = state;
  if (!["place", "role", "alpha", "density"].includes(sort)) texts.push(`${termName(sort)} ${numberText(valueOf(entry, sort))}`);
  const described = [
    headLabel(entry),
    ...Object.keys(numbers).map((key) => `${termName(key)} ${numberText(valueOf(entry, key))}`),
    `role ${entry.role}`,
  ];
  const link = element(
    "a",
    { className: "card", href: `#layer=${entry.layer}&head=${entry.head}`, title: described.join("\n") },
    element("span", { className: "frame" }, canvas),
    element("span", { className: "card-name" }, sort === "place" ? `head ${entry.head}` : shortName(entry)),
    element("span", { className: "card-numbers" }, texts.join(" \u00b7 ")),
    element("span", { className: `card-role role-${entry.role}` }, entry.role),
  );
  link.setAttribute("aria-label", described.join(", "));
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    change({ view: "head", layer: entry.layer, head: entry.head, pins: [] });
  });
  thumbnails.observe(canvas);
  return link;
}

function shortName(entry) {
  const numbers = data.layers[entry.layer].name.match(/\d+/g);
  const kind = { encoder: "enc", decoder: "dec", cross: "cross", self: "" }[data.layers[entry.layer].kind];
  return `${kind} ${numbers ? numbers.join(".") : entry.layer} \u00b7 ${entry.head}`.trim();
}

function showHeads() {
  thumbnails.disconnect();
  const chosen = chosenHeads();
  const total = allHeads().length;
  place("count").value = chosen.length === total ? `${total} head${total === 1 ? "" : "s"}` : `${chosen.length} of ${total} heads`;
  place("cards").hidden = state.table;
  place("cards-note").hidden = state.table || !chosen.length;
  place("heads-table").hidden = !state.table;
  if (!chosen.length) {
    place("cards").replaceChildren(element("p", { className: "soft empty" }, "No head matches these filters."));
    place("heads-table").replaceChildren(element("p", { className: "soft empty" }, "No head matches these filters."));
  } else if (state.table) showTable(chosen);
  else if (state.sort === "place") {
    const layers = [...new Set(chosen.map((entry) => entry.layer))];
    place("cards").replaceChildren(
      ...layers.map((layer) =>
        element(
          "section",
          { className: "layer" },
          element("h2", {}, data.layers[layer].name || "attention", element("span", { className: "soft" }, ` ${KIND_NAMES[data.layers[layer].kind]}`)),
          element("div", { className: "grid", style: `--heads:${data.layers[layer].roles.length}` }, ...chosen.filter((entry) => entry.layer === layer).map(card)),
        ),
      ),
    );
  } else place("cards").replaceChildren(element("div", { className: "grid" }, ...chosen.map(card)));
}

function showTable(chosen) {
  const keys = numberKeys();
  const titles = [["place", "layer"], ["", "head"], ...keys.map((key) => [key, termName(key)]), ["role", "role"]];
  const header = titles.map(([key, title]) => {
    if (!key) return element("th", {}, title);
    const button = element("button", { type: "button" }, title + (state.sort === key ? (state.descending ? " \u2193" : " \u2191") : ""));
    button.addEventListener("click", () => change({ sort: key, descending: state.sort === key && !state.descending }));
    return element("th", { "aria-sort": state.sort === key ? (state.descending ? "descending" : "ascending") : "none" }, button);
  });
  const rows = chosen.map((entry) => {
    const link = element("a", { href: `#layer=${entry.layer}&head=${entry.head}` }, String(entry.head));
    const numbers = keys.map((key) => element("td", {}, numberText(valueOf(entry, key))));
    return element("tr", {}, element("td", {}, data.layers[entry.layer].name || "attention"), element("td", {}, link), ...numbers, element("td", {}, entry.role));
  });
  place("heads-table").replaceChildren(
    element("table", {}, element("thead", {}, element("tr", {}, ...header)), element("tbody", {}, ...rows)),
  );
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}

function startHeads() {
  fillSelect(place("sort"), sortKeys().map((key) => [key, termName(key)]));
  fillSelect(place("kind"), [["", "all"], ...choices("kind").map((kind) => [kind, KIND_NAMES[kind]])]);
  fillSelect(place("role"), [["", "all"], ...choices("role").map((role) => [role, role])]);
  fillSelect(place("bounded"), [["", "none"], ...numberKeys().map((key) => [key, termName(key)])]);
  for (const key of ["sort", "kind", "role", "bounded"]) {
    place(key).addEventListener("change", () => change({ [key]: place(key).value }));
  }
  for (const key of ["low", "high"]) {
    place(key).addEventListener("input", () => {
      const value = place(key).value;
      change({ [key]: value === "" || !Number.isFinite(Number(value)) ? null : Number(value) });
    });
  }
  place("order").addEventListener("click", () => change({ descending: !state.descending }));
  place("as-table").addEventListener("click", () => change({ table: !state.table }));
  onChange((now, before) => {
    for (const key of ["sort", "kind", "role", "bounded"]) place(key).value = now[key];
    for (const key of ["low", "high"]) {
      place(key).disabled = !now.bounded;
      if (document.activeElement !== place(key)) place(key).value = now[key] ?? "";
    }
    place("order").textContent = now.descending ? "descending" : "ascending";
    place("order").setAttribute("aria-pressed", now.descending);
    place("as-table").setAttribute("aria-pressed", now.table);
    const shown = ["view", "sort", "descending", "kind", "role", "bounded", "low", "high", "table", "example", "theme"];
    if (now.view === "heads" && (now === before || shown.some((key) => now[key] !== before[key]))) showHeads();
  });
}

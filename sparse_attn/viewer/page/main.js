// Tabs, theme, keyboard, and the start.

function refresh() {
  for (const watcher of watchers) watcher(state, state);
}

function showView() {
  for (const view of VIEWS) {
    place(`view-${view}`).hidden = state.view !== view;
    place(`tab-${view}`).setAttribute("aria-selected", state.view === view);
    place(`tab-${view}`).tabIndex = state.view === view ? 0 : -1;
  }
  hideTip();
}

function nextTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const order = dark ? ["", "light", "dark"] : ["", "dark", "light"];
  root.dataset.theme = order[(order.indexOf(root.dataset.theme || "") + 1) % order.length];
  applyTheme();
}

function applyTheme() {
  const theme = document.documentElement.dataset.theme;
  place("theme").textContent = theme ? theme : "theme";
  makePalette();
  hatching = null;
  refresh();
}

function summarise() {
  const heads = allHeads().length;
  const index = exampleIndex(state.example);
  const longest = Math.max(...data.layers.map((layer) => data.texts[layer.maps[index].keys].tokens.length));
  const count = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;
  let entries = 0;
  for (const layer of data.layers) entries += layer.maps[index].entries;
  place("summary").textContent = [
    count(data.layers.length, "layer"),
    count(heads, "head"),
    `up to ${count(longest, "key")}`,
    `${count(entries, "weight")} that ${entries === 1 ? "is" : "are"} not zero`,
  ].join(" \u00b7 ");
}

function exampleLabel(index) {
  const longest = data.layers.map((layer) => data.texts[layer.maps[index].keys].tokens).reduce((a, b) => (b.length > a.length ? b : a));
  const label = data.labels[index] ?? longest.slice(0, 30).join(" ");
  return shortened(label.split(" ").map(printable).join(" "), 30);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || place("help").open) return;
  const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
  if (typing && event.key !== "Escape") return;
  const available = VIEWS.filter((view) => !place(`tab-${view}`).hidden);
  const actions = {
    ...Object.fromEntries(available.map((view, index) => [String(index + 1), () => change({ view })])),
    t: nextTheme,
    "?": () => place("help").showModal(),
  };
  if (state.view === "head") {
    Object.assign(actions, {
      ArrowLeft: () => stepHead(-1),
      ArrowRight: () => stepHead(1),
      j: () => stepLayer(1),
      k: () => stepLayer(-1),
      m: () => !place("merge").disabled && change({ merge: !state.merge }),
      "+": () => zoomBy(1),
      "=": () => zoomBy(1),
      "-": () => zoomBy(-1),
      0: () => change({ zoom: 0 }),
      Escape: () => change({ pins: [] }),
    });
  }
  if (event.target instanceof Element && event.target.closest('[role="tablist"]') && event.key.startsWith("Arrow")) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0;
    const next = available[(available.indexOf(state.view) + step + available.length) % available.length];
    change({ view: next });
    place(`tab-${next}`).focus();
    event.preventDefault();
  } else if (event.key in actions) {
    actions[event.key]();
    event.preventDefault();
  }
}

function start() {
  if (!("DecompressionStream" in window)) {
    showNotice("This page needs a browser from 2023 or later.");
    return;
  }
  if (data.leftOut) {
    const { entries, total, below } = data.leftOut;
    showNotice(
      `Of ${total.toLocaleString("en")} weights that are not zero, this page contains the ${(total - entries).toLocaleString("en")} largest; ` +
        `those below ${below.toPrecision(2)} are left out. The statistics of each head count all weights.`,
    );
  }
  const { previous, self, next, monotone, diffuse } = data.thresholds;
  const roles = `previous, self, next: at least ${100 * previous}% of the weight is on that position; monotone: moves forward over the keys (correlation at least ${monotone}); diffuse: spreads its weight almost evenly (at least ${100 * diffuse}% of the largest entropy); mixed: none of these`;
  TERMS.role[1] = `${TERMS.role[1]}: ${roles}`;
  place("terms").replaceChildren(
    ...numberKeys().concat("role").filter((key) => key in TERMS).flatMap((key) => [element("dt", {}, TERMS[key][0]), element("dd", {}, TERMS[key][1])]),
  );
  place("rounding").textContent = `Weights of at least 6e-5 are rounded to 1 part in 2,048 (float16)${data.coarse ? ", those below 1/8 to 1 part in 400, since the page has many weights" : ""}; smaller weights are less exact, and zeros are exact.`;
  fillSelect(place("example"), data.examples.map((example, index) => [example, `${example} \u00b7 ${exampleLabel(index)}`]));
  place("example-box").hidden = data.examples.length < 2;
  place("example").addEventListener("change", () => change({ example: Number(place("example").value) }));
  place("tab-report").hidden = !place("view-report").children.length;
  for (const view of VIEWS) place(`tab-${view}`).addEventListener("click", () => change({ view }));
  place("theme").addEventListener("click", nextTheme);
  place("help-open").addEventListener("click", () => place("help").showModal());
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => {
    state = readAddress();
    refresh();
  });
  window.addEventListener("popstate", () => {
    state = readAddress();
    refresh();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
  onChange((now) => {
    showView();
    place("example").value = now.example;
    summarise();
  });
  startHeads();
  startHead();
  startAlpha();
  state = readAddress();
  if (state.view === "report" && place("tab-report").hidden) state.view = "heads";
  applyTheme();
}

start();

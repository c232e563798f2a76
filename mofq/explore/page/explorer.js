// What stands beside the chart and the map, and what ties all of it together.

function setPoint(number) {
  state.point = Math.min(Math.max(number, 0), points.length - 1);
  if (state.show !== "frontier" && state.compare !== "frontier") {
    state.show = "frontier";
    byId("show").value = "frontier";
  }
  byId("bits-note").textContent = "";
  paint();
}

function paint() {
  const point = points[state.point];
  const slider = byId("slider");
  slider.value = String(state.point);
  slider.setAttribute("aria-valuetext", `${axisText(point.at)}${HAS_CONTEXT ? "" : " bits per weight"}, `
    + `${QUANTITY} ${numberText(pointValue(point))}`);
  if (document.activeElement !== byId("bits")) byId("bits").value = axisUp(point);
  byId("now").textContent = `${QUANTITY} ${withInterval(pointValue(point),
    data.is_kl ? point.kl_stderr : null)} · ${HAS_CONTEXT
    ? `${bitsText(point.bits_per_weight)} + ${bitsText(point.kv_bits)} bits` : bytesText(point.checkpoint_bytes)}`;
  paintCard(point);
  paintMap();
  paintPanel();
  paintDifferences();
  const most = chart && chart.scales.x.max; // null until it is drawn for the first time
  if (typeof most === "number" && point.at > most) {
    byId("whole").checked = true;
    makeChart();
  } else if (chart) chart.redraw(false);
}

// Rounded up: typed in again, it is enough for the point.
function axisUp(point) {
  const shown = HAS_CONTEXT ? point.at / SCALE[1] : point.at;
  return (Math.ceil(shown * 1e4 - 1e-7) / 1e4).toFixed(4);
}

function pair(name, value) {
  return element("div", {}, element("dt", { text: name }), element("dd", { text: value }));
}

function paintCard(point) {
  const figures = [
    ...(HAS_CONTEXT ? [pair(axisName(false), axisText(point.at))] : []),
    pair("true bits per weight", bitsText(point.bits_per_weight)),
    ...(data.cached ? [pair("KV cache, true bits per number",
      `${bitsText(point.kv_bits)}, ${bytesText(point.kv_bytes_per_token)} a token`)] : []),
    pair("checkpoint", bytesText(point.checkpoint_bytes)),
    pair(data.is_kl ? `${QUANTITY}, ${UNIT}, 95 %` : UNIT ? `${QUANTITY}, ${UNIT}` : QUANTITY,
      withInterval(pointValue(point), data.is_kl ? point.kl_stderr : null)),
  ];
  byId("figures").replaceChildren(...figures);
  byId("command").replaceChildren(...point.command.split(/(?<= )/).map((word) =>
    element("span", { text: word, class: word.startsWith("-") ? "word" : null })));
  paintShares(point);
  paintCaches(point);
  paintCorpora(point);
}

// How the weights divide over the schemes.
function paintShares(point) {
  const weights = new Map();
  schemesOfChoice(point.choice).forEach((scheme, group) => {
    if (groups[group].cached) return;
    weights.set(scheme, (weights.get(scheme) || 0) + groups[group].weights);
  });
  const parts = [...weights].sort((a, b) => a[0] - b[0]);
  const percent = (count) => `${numberText((100 * count) / data.weights, 3)} %`;
  byId("shares").replaceChildren(...parts.map(([scheme, count]) => {
    const part = element("span");
    part.style.background = colours[scheme];
    part.style.flexGrow = String(count);
    return part;
  }));
  byId("shares").setAttribute("aria-label",
    `Weights by scheme: ${parts.map(([s, c]) => `${schemeName(s)} ${percent(c)}`).join(", ")}`);
  const largest = [...parts].sort((a, b) => b[1] - a[1]);
  byId("share-list").replaceChildren(...largest.slice(0, 5).map(([scheme, count]) =>
    element("li", {}, swatch(scheme), brokenName(scheme),
      element("span", { class: "count", text: percent(count) }))),
  ...(largest.length > 5 ? [element("li", { text: `and ${largest.length - 5} more` })] : []));
}

// How many attention layers keep their keys and values in each format.
function paintCaches(point) {
  byId("caches").hidden = !data.cached;
  const layers = new Map();
  schemesOfChoice(point.choice).forEach((scheme, group) => {
    if (groups[group].cached) layers.set(scheme, (layers.get(scheme) || 0) + 1);
  });
  byId("cache-list").replaceChildren(...[...layers].sort((a, b) => b[1] - a[1]).map(([scheme, count]) =>
    element("li", {}, swatch(scheme), brokenName(scheme),
      element("span", { class: "count", text: countText(count, "layer") }))));
}

// A name that may break before its second half.
function brokenName(scheme) {
  const [first, ...others] = schemeName(scheme).split(/(?=[+/])/);
  return element("span", {}, first, ...others.flatMap((one) => [element("wbr"), one]));
}

// Per corpus: what this recipe costs, and what a recipe made for that corpus alone would.
function paintCorpora(point) {
  const names = Object.keys(data.corpus_best);
  if (!names.length) return;
  const rows = names.map((name) => {
    const best = data.corpus_best[name][state.point];
    const [ours, theirs] = data.corpus_errors[name][state.point];
    const differ = best.filter((option, group) => option !== point.choice[group]).length;
    return element("tr", {},
      element("th", { scope: "row", text: name }),
      element("td", { text: numberText(ours) }),
      element("td", { text: numberText(theirs) }),
      element("td", {}, element("button", {
        type: "button",
        class: "link",
        text: `${differ} differ`,
        onclick: () => {
          state.show = byId("show").value = "frontier";
          state.compare = byId("compare").value = `corpus:${name}`;
          paint();
        },
      })));
  });
  byId("corpora").replaceChildren(element("table", {},
    element("thead", {}, element("tr", {}, ...["corpus", "this recipe", "made for it", "groups"]
      .map((text) => element("th", { scope: "col", text })))),
    element("tbody", {}, ...rows)));
}

const MOST_DIFFERENCES = 100;
const layerGroups = groups.filter((one) => !one.cached).length;

function paintDifferences() {
  const shown = selection(state.show), other = selection(state.compare);
  byId("differences").hidden = other === null || state.show === state.compare;
  if (byId("differences").hidden) return;
  const found = [];
  let unmeasured = 0;
  shown.schemes.forEach((scheme, group) => {
    if (scheme === other.schemes[group]) return;
    const [to, from] = [optionOf(group, scheme), optionOf(group, other.schemes[group])];
    if (!to || !from) unmeasured += 1;
    found.push({
      group, to: scheme, from: other.schemes[group],
      error: to && from ? optionError(to) - optionError(from) : null,
      bytes: to && from ? sizeOf(group, to) - sizeOf(group, from) : null,
    });
  });
  const cached = found.filter((one) => groups[one.group].cached).length;
  found.sort((a, b) => Math.abs(b.error || 0) - Math.abs(a.error || 0));
  const sum = (key, some = found) => some.reduce((total, one) => total + (one[key] || 0), 0);
  const apart = found.filter((one) => isPerToken(one.group)), joined = found.filter((one) => !isPerToken(one.group));
  byId("differences-summary").textContent = found.length === 0
    ? `${shown.label} and ${other.label} choose the same everywhere.`
    : `${found.length - cached} of ${countText(layerGroups, "fusion group")}`
      + (data.cached ? ` and ${cached} of ${countText(groups.length - layerGroups, "KV cache")}` : "")
      + ` differ. Against ${other.label}, `
      + `${shown.label} costs ${amount(signedText(sum("error"), numberText))} and `
      + `${signedText(sum("bytes", joined), bytesText)}`
      + (apart.length ? `, and ${signedText(sum("bytes", apart), bytesText)} a token of the cache` : "")
      + (unmeasured ? `, without ${countText(unmeasured, "group")} whose schemes the table has not.` : ".");
  const rows = found.slice(0, MOST_DIFFERENCES).map((one) => element("tr", {},
    element("th", { scope: "row" }, element("button", {
      type: "button", class: "link", text: groups[one.group].name, onclick: () => openPanel(one.group) })),
    element("td", {}, swatch(one.from), schemeName(one.from)),
    element("td", {}, swatch(one.to), schemeName(one.to)),
    element("td", { text: one.error === null ? "–" : signedText(one.error, numberText) }),
    element("td", { text: one.bytes === null ? "–" : signedText(one.bytes, (size) => sizeText(one.group, size)) })));
  byId("differences-table").replaceChildren(...(found.length
    ? [stackedTable(["fusion group", "compared", "shown", QUANTITY, "size"], rows)] : []),
  ...(found.length > MOST_DIFFERENCES
    ? [element("p", { class: "small", text: `and ${found.length - MOST_DIFFERENCES} more` })] : []));
}

// A row for each recipe: what is predicted of it, and all that was measured.
function paintPoints() {
  const kinds = { uniform: () => "one scheme", greedy: () => "MoFQ's rule", recipe: (one) => one.solver || "–" };
  const sizes = (one) => [one.bits_per_weight, ...(data.cached ? [one.kv_bits] : [])]
    .map((bits) => (bits === null || bits === undefined ? "–" : bitsText(bits)))
    .concat(HAS_CONTEXT ? [one.at === null ? "–" : axisText(one.at)] : []);
  const measuredText = (some) => some.map((one) =>
    `${withError(one.kl_nats_per_token, one.kl_stderr)} on ${one.text}`).join("; ") || "–";
  const rows = data.references.map((one, number) => [one.at, one.label, kinds[one.kind](one), ...sizes(one),
    withInterval(one.value, one.stderr), measuredText(data.measured.filter((other) => other.reference === number))]);
  data.measured.filter((one) => one.reference === null).forEach((one) => rows.push([one.at, one.label, "–",
    ...sizes(one), withInterval(one.predicted, one.predicted_stderr), measuredText([one])]));
  rows.sort((a, b) => (a[0] || 0) - (b[0] || 0));
  const columns = ["recipe", "made by", "bits", ...(data.cached ? ["KV bits"] : []), ...(HAS_CONTEXT ? ["size"] : []),
    data.is_kl ? `${QUANTITY}, predicted, 95 %` : `${QUANTITY}, predicted`].concat(data.measured.length ? [`${QUANTITY}, measured`] : []);
  byId("points").replaceChildren(stackedTable(columns, rows.map(([, label, ...values]) => element("tr", {},
    element("th", { scope: "row", text: label }),
    ...values.slice(0, columns.length - 1).map((text) => element("td", { text }))))));
}

function fillMenus() {
  const ofKind = (kind) => data.references.map((one, number) => [`reference:${number}`, one.label])
    .filter((_, number) => data.references[number].kind === kind);
  const corpora = Object.keys(data.corpus_best).map((name) => [`corpus:${name}`, `best for ${name} alone`]);
  const options = (list) => list.map(([value, text]) => element("option", { value, text }));
  const part = (label, list) => (list.length ? [element("optgroup", { label }, ...options(list))] : []);
  const all = () => [...options([["frontier", "the recipe at this budget"]]),
    ...part("Recipes", ofKind("recipe")), ...part("Greedy", ofKind("greedy")), ...part("Uniform", ofKind("uniform")), ...part("Corpora", corpora)];
  byId("show").replaceChildren(...all());
  byId("compare").replaceChildren(...options([["none", "nothing"]]), ...all());
  byId("show").value = state.show;
  byId("compare").value = state.compare;
  for (const kind of Object.keys(WALLS)) {
    if (hasWalls(kind)) byId("colour").append(element("option", { value: kind, text: `by walls of the ${kind}` }));
  }
}

function download() {
  const link = element("a", { download: "recipe.yaml" });
  link.href = URL.createObjectURL(new Blob([recipeText(state.point)], { type: "application/yaml" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copyCommand() {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("command").textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("command")); // no clipboard: Ctrl+C does it
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function takeBits() {
  const field = byId("bits"), number = Number(field.value.trim().replace(",", "."));
  const at = HAS_CONTEXT ? number * SCALE[1] : number, unit = HAS_CONTEXT ? SCALE[0] : "bits";
  if (!(at > 0)) {
    byId("bits-note").textContent = `A number of ${unit}, for example 4.5.`;
    return;
  }
  setPoint(pointAt(at));
  field.value = axisUp(points[state.point]);
  if (at < points[0].at) byId("bits-note").textContent = `The smallest has ${axisUp(points[0])} ${unit}.`;
}

function themeChanged() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  colours = schemeColours();
  paint();
}

function listen() {
  byId("slider").addEventListener("input", (event) => setPoint(Number(event.target.value)));
  byId("bits").addEventListener("change", takeBits);
  byId("log").addEventListener("change", makeChart);
  byId("whole").addEventListener("change", makeChart);
  byId("download").addEventListener("click", download);
  byId("copy").addEventListener("click", copyCommand);
  for (const name of ["show", "compare", "colour"]) {
    byId(name).addEventListener("change", (event) => {
      state[name] = event.target.value;
      paint();
    });
  }
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    themeChanged();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themeChanged);
  NARROW.addEventListener("change", () => { makeMap(); makeChart(); paint(); });
  new ResizeObserver(() => {
    const { clientWidth, clientHeight } = byId("chart");
    if (chart) chart.setSize({ width: clientWidth, height: clientHeight });
  }).observe(byId("chart"));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  document.addEventListener("scroll", followFocus, { passive: true });
  listenToMap();
}

function start() {
  const isWeighted = data.corpus_weights.some((weight) => weight !== data.corpus_weights[0]);
  const corpora = data.corpora.filter((name) => name !== null).map(
    (name, corpus) => (isWeighted ? `${name} (weight ${data.corpus_weights[corpus]})` : name));
  byId("model").textContent = data.model;
  byId("lineage").textContent = [
    data.table,
    countText(layerGroups, "fusion group"),
    ...(data.cached ? [countText(groups.length - layerGroups, "KV cache")] : []),
    countText(data.schemes.length, "scheme"),
    corpora.length ? `${QUANTITY} from ${countText(data.samples, "sample")} of ${corpora.join(", ")}`
      : `${QUANTITY}, without calibration`,
    ...data.constraints,
  ].join(" · ");
  byId("footer").textContent = `Table ${data.table_sha256} · frontier of ${countText(points.length, "recipe")}`;
  if (HAS_CONTEXT) byId("axis").textContent = `${SCALE[0]} of ${axisName(false)}`;
  byId("slider").max = String(points.length - 1);
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  const compared = data.references.find((one) => one.kind === "recipe" && one.at !== null);
  const drawn = points.filter((one) => one.at <= axisRange()[1]).length;
  state.point = compared ? pointAt(compared.at) : Math.floor(drawn / 2);
  fillMenus();
  listen();
  makeMap();
  makeKey();
  paintPoints();
  makeChart();
  paint();
}

start();

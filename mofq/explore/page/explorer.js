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
  slider.setAttribute("aria-valuetext", `${bitsText(point.bits_per_weight)} bits per weight, `
    + `${QUANTITY} ${numberText(pointValue(point))}`);
  if (document.activeElement !== byId("bits")) byId("bits").value = bitsUp(point);
  byId("now").textContent = `${QUANTITY} ${withError(pointValue(point),
    content.is_kl ? point.kl_stderr : null)} · ${bytesText(point.checkpoint_bytes)}`;
  paintCard(point);
  paintMap();
  paintPanel();
  paintDifferences();
  const most = chart && chart.scales.x.max; // null until it is drawn for the first time
  if (typeof most === "number" && point.bits_per_weight > most) {
    byId("whole").checked = true;
    makeChart();
  } else if (chart) chart.redraw(false);
}

// Rounded up: typed in again, it is enough for the point.
function bitsUp(point) {
  return (Math.ceil(point.bits_per_weight * 1e4 - 1e-7) / 1e4).toFixed(4);
}

function pair(name, value) {
  return element("div", {}, element("dt", { text: name }), element("dd", { text: value }));
}

function paintCard(point) {
  const figures = [
    pair("true bits per weight", bitsText(point.bits_per_weight)),
    pair("checkpoint", bytesText(point.checkpoint_bytes)),
    pair(UNIT ? `${QUANTITY}, ${UNIT}` : QUANTITY,
      withError(pointValue(point), content.is_kl ? point.kl_stderr : null)),
  ];
  if (point.kl_joint !== null && point.kl_joint !== undefined) {
    figures.push(pair("with interactions", withError(point.kl_joint, point.kl_joint_stderr)));
  }
  byId("figures").replaceChildren(...figures);
  byId("command").replaceChildren(...point.command.split(/(?<= )/).map((word) =>
    element("span", { text: word, class: word.startsWith("-") ? "word" : null })));
  paintShares(point);
  paintCorpora(point);
}

// How the weights divide over the schemes.
function paintShares(point) {
  const weights = new Map();
  schemesOfChoice(point.choice).forEach((scheme, group) => {
    weights.set(scheme, (weights.get(scheme) || 0) + groups[group].weights);
  });
  const parts = [...weights].sort((a, b) => a[0] - b[0]);
  const percent = (count) => `${numberText((100 * count) / content.weights, 3)} %`;
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

// A name that may break before its second half.
function brokenName(scheme) {
  const [weights, ...activations] = schemeName(scheme).split("+");
  return element("span", {}, weights, ...activations.flatMap((one) => [element("wbr"), `+${one}`]));
}

// Per corpus: what this recipe costs, and what a recipe made for that corpus alone would.
function paintCorpora(point) {
  const names = Object.keys(content.corpus_best);
  if (!names.length) return;
  const total = (choice, corpus) => choice.reduce(
    (sum, option, group) => sum + groups[group].options[option][ERRORS][corpus], 0);
  const rows = names.map((name) => {
    const corpus = content.corpora.indexOf(name), best = content.corpus_best[name][state.point];
    const differ = best.filter((option, group) => option !== point.choice[group]).length;
    return element("tr", {},
      element("th", { scope: "row", text: name }),
      element("td", { text: numberText(total(point.choice, corpus)) }),
      element("td", { text: numberText(total(best, corpus)) }),
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
      bytes: to && from ? to[BYTES] - from[BYTES] : null,
    });
  });
  found.sort((a, b) => Math.abs(b.error || 0) - Math.abs(a.error || 0));
  const sum = (key) => found.reduce((total, one) => total + (one[key] || 0), 0);
  byId("differences-summary").textContent = found.length === 0
    ? `${shown.label} and ${other.label} choose the same everywhere.`
    : `${found.length} of ${countText(groups.length, "fusion group")} differ. Against ${other.label}, `
      + `${shown.label} costs ${amount(signedText(sum("error"), numberText))} and `
      + `${signedText(sum("bytes"), bytesText)}`
      + (unmeasured ? `, without ${countText(unmeasured, "group")} whose schemes the table has not.` : ".");
  const rows = found.slice(0, MOST_DIFFERENCES).map((one) => element("tr", {},
    element("th", { scope: "row" }, element("button", {
      type: "button", class: "link", text: groups[one.group].name, onclick: () => openPanel(one.group) })),
    element("td", {}, swatch(one.from), schemeName(one.from)),
    element("td", {}, swatch(one.to), schemeName(one.to)),
    element("td", { text: one.error === null ? "–" : signedText(one.error, numberText) }),
    element("td", { text: one.bytes === null ? "–" : signedText(one.bytes, bytesText) })));
  byId("differences-table").replaceChildren(...(found.length ? [element("table", {},
    element("thead", {}, element("tr", {}, ...["fusion group", "compared", "shown", QUANTITY, "size"]
      .map((text) => element("th", { scope: "col", text })))),
    element("tbody", {}, ...rows))] : []),
  ...(found.length > MOST_DIFFERENCES
    ? [element("p", { class: "small", text: `and ${found.length - MOST_DIFFERENCES} more` })] : []));
}

function paintPoints() {
  const kinds = { uniform: () => "uniform", greedy: () => "MoFQ's rule",
    recipe: (one) => (one.solver ? `compared, made by ${one.solver}` : "compared") };
  const rows = content.named.map((one) => [one.label, kinds[one.kind](one),
    one.bits_per_weight, withError(one.value, one.stderr), "–"]);
  content.measured.forEach((one) => rows.push([one.label, `measured on ${one.text}`,
    one.bits_per_weight, withError(one.predicted, one.predicted_stderr),
    withError(one.kl_nats_per_token, one.kl_stderr)]));
  rows.sort((a, b) => (a[2] || 0) - (b[2] || 0));
  const columns = ["", "", "bits", `${QUANTITY}, predicted`]
    .concat(content.measured.length ? ["measured"] : []);
  byId("points").replaceChildren(element("table", {},
    element("thead", {}, element("tr", {}, ...columns.map((text) => element("th", { scope: "col", text })))),
    element("tbody", {}, ...rows.map(([label, kind, bits, ...values]) => element("tr", {},
      element("th", { scope: "row", text: label }), element("td", { text: kind }),
      element("td", { text: bits === null ? "–" : bitsText(bits) }),
      ...values.slice(0, columns.length - 3).map((text) => element("td", { text })))))));
}

function fillMenus() {
  const named = content.named.map((one, number) => [`named:${number}`, one.label]);
  const own = named.filter((_, number) => content.named[number].kind === "recipe");
  const greedy = named.filter((_, number) => content.named[number].kind === "greedy");
  const uniform = named.filter((_, number) => content.named[number].kind === "uniform");
  const corpora = Object.keys(content.corpus_best).map((name) => [`corpus:${name}`, `best for ${name} alone`]);
  const options = (list) => list.map(([value, text]) => element("option", { value, text }));
  const part = (label, list) => (list.length ? [element("optgroup", { label }, ...options(list))] : []);
  const all = () => [...options([["frontier", "the recipe at this budget"]]),
    ...part("Recipes", own), ...part("Greedy", greedy), ...part("Uniform", uniform), ...part("Corpora", corpora)];
  byId("show").replaceChildren(...all());
  byId("compare").replaceChildren(...options([["none", "nothing"]]), ...all());
  if (own.length) {
    state.show = own[0][0];
    state.compare = own.length > 1 ? own[1][0] : "frontier";
  }
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
  const field = byId("bits"), bits = Number(field.value.trim().replace(",", "."));
  const least = points[0].bits_per_weight;
  if (!(bits > 0)) {
    byId("bits-note").textContent = "A number of bits, for example 4.5.";
    return;
  }
  setPoint(pointAt(bits));
  field.value = bitsUp(points[state.point]);
  if (bits < least) byId("bits-note").textContent = `The smallest has ${least.toFixed(4)} bits.`;
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
  const corpora = content.corpora.filter((name) => name !== null);
  byId("model").textContent = content.model;
  byId("lineage").textContent = [
    content.table,
    countText(groups.length, "fusion group"),
    countText(content.schemes.length, "scheme"),
    corpora.length ? `${QUANTITY} from ${countText(content.samples, "sample")} of ${corpora.join(", ")}`
      : `${QUANTITY}, without calibration`,
  ].join(" · ");
  byId("footer").textContent = `Table ${content.table_sha256} · frontier of ${countText(points.length, "recipe")}`;
  byId("slider").max = String(points.length - 1);
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  const compared = content.named.find((one) => one.kind === "recipe" && one.bits_per_weight !== null);
  const drawn = points.filter((one) => one.bits_per_weight <= bitsRange()[1]).length;
  state.point = compared ? pointAt(compared.bits_per_weight) : Math.floor(drawn / 2);
  fillMenus();
  listen();
  makeMap();
  makeKey();
  paintPoints();
  makeChart();
  paint();
}

start();

// The model as a map, the tip of a cell, the panel of a fusion group.

let cells = []; // of each fusion group its element
let cellPlaces = []; // [decoder layer, module], as places in the map

function mapAxes() {
  const layers = [...new Set(groups.map((one) => one.decoder_layer))].sort(
    (a, b) => (a === null) - (b === null) || a - b,
  );
  const modules = [];
  const taken = new Set();
  const places = groups.map((one) => {
    let module = one.module;
    if (taken.has(`${one.decoder_layer} ${module}`)) module = one.name;
    taken.add(`${one.decoder_layer} ${module}`);
    if (!modules.includes(module)) modules.push(module);
    return [layers.indexOf(one.decoder_layer), modules.indexOf(module)];
  });
  return { layers, modules, places };
}

const UPRIGHT = 4; // names of modules that fit side by side where the page is narrow

// Wide: a column for each decoder layer. Narrow: a row.
function makeMap() {
  const { layers, modules, places } = mapAxes();
  const narrow = NARROW.matches, map = byId("map");
  const [rows, columns] = narrow ? [layers, modules] : [modules, layers];
  const step = layers.length > 48 ? 10 : layers.length > 20 ? 5 : 1;
  const layerText = (number) => {
    if (layers[number] === null) return "–";
    return number % step === 0 ? String(layers[number]) : "";
  };
  const corner = element("span", { class: "corner", text: narrow ? "layer" : "" });
  const head = columns.map((name, number) =>
    element("span", { class: "head", role: "columnheader", text: narrow ? name : layerText(number) }));
  cellPlaces = places;
  cells = [];
  const lines = rows.map((name, row) => {
    const line = element("div", { role: "row", class: "line" },
      element("span", { class: "name", role: "rowheader", text: narrow ? layerText(row) : name }));
    columns.forEach((_, column) => {
      const wanted = narrow ? [row, column] : [column, row];
      const group = places.findIndex(([l, m]) => l === wanted[0] && m === wanted[1]);
      line.append(group < 0 ? element("span", { role: "gridcell" }) : makeCell(group));
    });
    return line;
  });
  map.classList.toggle("dense", columns.length > 48);
  map.classList.toggle("tall", rows.length > 48);
  map.classList.toggle("upright", narrow && columns.length > UPRIGHT);
  map.style.setProperty("--columns", columns.length);
  map.style.setProperty("--name", narrow ? "3rem" : "auto");
  map.replaceChildren(element("div", { role: "row", class: "line" }, corner, ...head), ...lines);
}

function makeCell(group) {
  const cell = element("button", {
    type: "button",
    role: "gridcell",
    class: "cell",
    tabindex: group === (state.group || 0) ? "0" : "-1",
    "data-group": group,
  });
  cells[group] = cell;
  return cell;
}

function groupOfEvent(event) {
  const cell = event.target.closest(".cell");
  return cell === null ? null : Number(cell.dataset.group);
}

function listenToMap() {
  const map = byId("map");
  map.addEventListener("click", (event) => {
    const group = groupOfEvent(event);
    if (group !== null) openPanel(group);
  });
  map.addEventListener("pointerover", (event) => {
    const group = groupOfEvent(event);
    if (event.pointerType !== "touch" && group !== null) tipOfCell(group);
  });
  map.addEventListener("pointerout", hideTip);
  map.addEventListener("focusin", (event) => {
    const group = groupOfEvent(event);
    if (group !== null && event.target.matches(":focus-visible")) tipOfCell(group);
  });
  map.addEventListener("focusout", hideTip);
  map.addEventListener("keydown", moveFocus);
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function moveFocus(event) {
  const group = groupOfEvent(event);
  if (event.key === "Escape") hideTip();
  if (group === null || !(event.key in MOVES)) return;
  event.preventDefault();
  const [across, down] = MOVES[event.key];
  const [stepLayer, stepModule] = NARROW.matches ? [down, across] : [across, down];
  const [layer, module] = cellPlaces[group];
  const ahead = cellPlaces
    .map(([l, m], other) => [other, (l - layer) * stepLayer + (m - module) * stepModule,
      stepLayer ? m === module : l === layer])
    .filter(([, distance, inLine]) => distance > 0 && inLine)
    .sort((a, b) => a[1] - b[1]);
  if (ahead.length) focusCell(ahead[0][0]);
}

function focusCell(group) {
  cells.forEach((cell) => { cell.tabIndex = -1; });
  cells[group].tabIndex = 0;
  cells[group].focus();
}

// Focus may scroll the page: the tip of the focused cell goes with it, any other goes.
function followFocus() {
  const focused = document.activeElement;
  if (byId("tip").hidden) return;
  if (focused && focused.matches(".cell:focus-visible")) tipOfCell(Number(focused.dataset.group));
  else hideTip();
}

function paintMap() {
  const shown = selection(state.show), other = selection(state.compare);
  const errors = shown.schemes.map((scheme, group) => {
    const option = optionOf(group, scheme);
    return option ? optionError(option) : null;
  });
  const values = state.colour === "error" ? errors : groups.map((one) => wallOf(one, state.colour));
  const scale = state.colour === "scheme" ? null : heatScale(values);
  cells.forEach((cell, group) => {
    const scheme = shown.schemes[group];
    const differs = other !== null && other.schemes[group] !== scheme;
    const isUnknown = scale !== null && values[group] === null;
    cell.style.background = scale === null ? colours[scheme]
      : isUnknown ? null : heatColour(scale.shareOf(values[group]));
    cell.classList.toggle("unknown", isUnknown);
    cell.classList.toggle("differs", differs);
    cell.classList.toggle("faded", scale === null && state.scheme !== null ? scheme !== state.scheme
      : other !== null && !differs);
    cell.setAttribute("aria-selected", String(group === state.group));
    cell.setAttribute("aria-label", `${groups[group].name}: ${schemeName(scheme)}`
      + (differs ? `, not ${schemeName(other.schemes[group])}` : ""));
  });
  if (scale === null) makeLegend(shown);
  else makeHeatLegend(scale, values.includes(null));
}

const WALLS = { weights: "weights", inputs: "inputs" };

function heatColour(share) {
  return `color-mix(in oklab, var(--heat) ${(100 * share).toFixed(1)}%, var(--cold))`;
}

// From a value to the share of the strongest colour, and back: errors by their square root, walls
// by their logarithm.
function heatScale(values) {
  const most = Math.max(...values.map((value) => value || 0));
  if (state.colour === "error") {
    return {
      title: `${QUANTITY} of a fusion group`,
      shareOf: (error) => Math.sqrt(error / (most || 1)),
      textAt: (share) => numberText(share * share * most, 2),
    };
  }
  const highest = Math.max(2, most);
  return {
    title: `Largest input channel of the ${WALLS[state.colour]}, over the typical one`,
    shareOf: (wall) => Math.log(Math.max(1, wall)) / Math.log(highest),
    textAt: (share) => `${numberText(highest ** share, 2)}×`,
  };
}

const HEAT_STEPS = [0, 0.25, 0.5, 0.75, 1];

function makeHeatLegend(scale, hasUnknown) {
  const step = (background, text) => {
    const box = element("span", { class: background ? "swatch" : "swatch unknown", "aria-hidden": "true" });
    box.style.background = background;
    return element("span", { class: "step" }, box, text);
  };
  byId("legend").setAttribute("aria-label", scale.title);
  byId("legend").replaceChildren(element("span", { class: "step", text: scale.title }),
    ...HEAT_STEPS.map((share) => step(heatColour(share), scale.textAt(share))),
    ...(hasUnknown ? [step("", "not known")] : []));
}

const FEW = 4; // unused schemes that the legend lists unasked

function makeLegend(shown) {
  const counts = data.schemes.map(() => 0);
  shown.schemes.forEach((scheme) => { counts[scheme] += 1; });
  const focused = document.activeElement && document.activeElement.dataset.scheme;
  const unused = counts.filter((count) => !count).length;
  const listed = data.schemes.map((_, scheme) => scheme).filter((scheme) =>
    counts[scheme] || unused <= FEW || state.allSchemes || state.scheme === scheme);
  const more = unused > FEW ? [element("button", {
    type: "button", class: "scheme unused", "data-scheme": "more", "aria-expanded": String(state.allSchemes),
    text: state.allSchemes ? "fewer" : `${unused} not used`,
    onclick: () => { state.allSchemes = !state.allSchemes; paintMap(); } })] : [];
  byId("legend").setAttribute("aria-label", "Schemes; choose one to see where it is used");
  byId("legend").replaceChildren(...listed.map((scheme) =>
    element("button", {
      type: "button",
      class: counts[scheme] ? "scheme" : "scheme unused",
      "data-scheme": scheme,
      "aria-pressed": String(state.scheme === scheme),
      onclick: () => {
        state.scheme = state.scheme === scheme ? null : scheme;
        paintMap();
      },
    }, swatch(scheme), schemeName(scheme), element("span", { class: "count", text: String(counts[scheme]) }))), ...more);
  if (focused !== undefined && focused !== null) {
    const again = [...byId("legend").children].find((one) => one.dataset.scheme === focused);
    if (again) again.focus();
  }
}

function sortedOptions(group) {
  return [...groups[group].options].sort((a, b) =>
    a[BYTES] - b[BYTES] || a[BITS] - b[BITS] || optionError(b) - optionError(a));
}

function tipOfCell(group) {
  const one = groups[group], chosen = selection(state.show).schemes[group];
  const rows = sortedOptions(group).map((option) =>
    element("tr", option[SCHEME] === chosen ? { class: "chosen" } : {},
      element("td", {}, swatch(option[SCHEME]), schemeName(option[SCHEME])),
      element("td", { text: rowText(optionError(option), optionStderr(option)) }),
      element("td", { text: sizeText(group, sizeOf(group, option)) })));
  const box = cells[group].getBoundingClientRect();
  showTip(box.right - 6, box.top + box.height / 2,
    element("strong", { text: one.name }),
    wallLine(one),
    element("table", {}, element("thead", {}, element("tr", {},
      element("th", { text: "scheme" }), element("th", { text: ROW_QUANTITY }),
      element("th", { text: "size" }))), element("tbody", {}, ...rows)));
}

function wallLine(one) {
  const parts = Object.entries(WALLS).map(([kind, text]) => [text, wallOf(one, kind)])
    .filter(([, value]) => value !== null)
    .map(([text, value]) => `${text} ${numberText(value, value < 10 ? 2 : 3)}×`);
  return parts.length ? element("div", { class: "small", text: `highest channel: ${parts.join(", ")} the typical` }) : null;
}

function openPanel(group) {
  cells.forEach((cell) => { cell.tabIndex = -1; });
  cells[group].tabIndex = 0;
  state.group = group;
  paintMap();
  paintPanel();
  if (NARROW.matches) byId("panel").scrollIntoView({ block: "nearest" });
}

function paintPanel() {
  if (state.group === null) return;
  const one = groups[state.group], chosen = selection(state.show).schemes[state.group];
  byId("panel-title").textContent = one.name;
  const [attention, heads, channels] = one.layers[0];
  const shapes = one.cached ? `${attention}: keys and values of ${countText(heads, "head")} of ${channels} channels`
    : one.layer_count > one.layers.length
    ? `${countText(one.layer_count, "linear layer")}, the first ${one.layers[0][0]}`
    : one.layers.map(([name, out, into]) => `${name} [${out} × ${into}]`).join(", ");
  byId("panel-body").replaceChildren(
    element("p", { class: "small", text: `${shapes}; `
      + (one.cached ? `${countText(one.cached, "number")} a token` : countText(one.weights, "weight")) }),
    ...whySentences(state.group, chosen).map((text) => element("p", { text })),
    element("div", { class: "scroll" }, errorTable(one, chosen)),
    ...one.options.some((option) => option[ERRORS].some(isOutOfRange)) ? [element("p", {
      text: `† Above ${data.row_error.largest} nats per token, more than any single layer was compared `
        + "with a measurement at: it may cost much more.",
    })] : [],
    ...(one.rejected.length ? [rejectedList(one)] : []),
    ...[profileSection(one)].filter((part) => part !== null),
  );
}

// What the next better and the next smaller choice would bring, beside the going rate.
function whySentences(group, chosen) {
  const here = optionOf(group, chosen);
  if (!here) return [`${schemeName(chosen)} was not measured here.`];
  const total = pointValue(points[state.point]);
  const share = state.show === "frontier" && total > 0 && optionError(here) > 0
    ? `, ${numberText((100 * optionError(here)) / total, 2)} % of the whole recipe's` : "";
  const sentences = [`${schemeName(chosen)}: ${amount(rowText(optionError(here), optionStderr(here)))}`
    + `${share}, ${sizeText(group, sizeOf(group, here))} `
    + `(${bitsText(here[BITS])} bits per ${groups[group].cached ? "number" : "weight"}).`];
  const size = (option) => sizeOf(group, option);
  const rate = (option) => (optionError(here) - optionError(option)) / (size(option) - size(here));
  const better = groups[group].options.filter((o) => size(o) > size(here) && optionError(o) < optionError(here));
  const smaller = groups[group].options.filter((o) => size(o) < size(here));
  const sentence = (option, verb) =>
    `${schemeName(option[SCHEME])} would ${verb} `
    + `${amount(numberText(Math.abs(optionError(option) - optionError(here))))} for `
    + `${signedText(size(option) - size(here), (bytes) => sizeText(group, bytes))}`
    + (isPerToken(group) ? "" : `: ${numberText(rate(option) * 1e6)} a megabyte`);
  const going = isPerToken(group) ? null : goingRate();
  if (better.length) {
    const best = better.reduce((a, b) => (rate(b) > rate(a) ? b : a));
    sentences.push(`${sentence(best, "save")}`
      + (going === null ? "." : `; at this budget the next megabyte saves ${numberText(going * 1e6)} elsewhere.`));
  }
  if (smaller.length) {
    const best = smaller.reduce((a, b) => (rate(b) < rate(a) ? b : a));
    sentences.push(`${sentence(best, optionError(best) < optionError(here) ? "save" : "cost")}.`);
  }
  const number = numberSentence(group, chosen);
  return number === null ? sentences : [...sentences, number];
}

// Error that one more byte saves along the frontier, in the sums that the solver minimises.
function goingRate() {
  if (state.show !== "frontier" || state.point + 1 >= points.length) return null;
  const [here, next] = [points[state.point], points[state.point + 1]];
  return (here.error - next.error) / (next.size - here.size);
}

function errorTable(one, chosen) {
  const group = groups.indexOf(one), options = sortedOptions(group);
  const positive = options.flatMap((option) => option[ERRORS]).filter((error) => error > 0);
  const [least, most] = [Math.min(...positive) / 1.5, Math.max(...positive) * 1.5];
  const along = (value) =>
    (100 * Math.log(Math.max(value, least) / least)) / (Math.log(most / least) || 1);
  const rows = options.map((option) => element("tr", option[SCHEME] === chosen ? { class: "chosen" } : {},
    element("th", { scope: "row" }, element("span", { class: "named" },
      swatch(option[SCHEME]), brokenName(option[SCHEME]))),
    element("td", { text: bitsText(option[BITS]) }),
    element("td", { text: sizeText(group, sizeOf(group, option)) }),
    element("td", { class: "dots" }, positive.length ? dots(option, along) : null),
    ...option[ERRORS].map((error, corpus) => element("td", {
      text: rowText(error, option[STDERRS] && option[STDERRS][corpus]) }))));
  const heads = data.corpora.length < 2 ? [ROW_QUANTITY] : data.corpora.map((name, corpus) => element("span", {},
    element("span", { class: `dot corpus-${corpus % 4}`, "aria-hidden": "true" }), name));
  const table = stackedTable(["scheme", "bits", "size", "error, log scale", ...heads], rows);
  table.classList.add("errors");
  return table;
}

// A dot for each corpus, with two standard errors to both sides.
function dots(option, along) {
  const track = element("div", { class: "track" });
  option[ERRORS].forEach((error, corpus) => {
    if (!(error > 0)) return;
    const stderr = rowStderr(error, option[STDERRS] && option[STDERRS][corpus]) || 0;
    const bar = element("span", { class: "bar-line" });
    const [low, high] = [along(error - 2 * stderr), Math.min(100, along(error + 2 * stderr))];
    bar.style.left = `${low}%`;
    bar.style.width = `${Math.max(0, high - low)}%`;
    const dot = element("span", { class: `dot corpus-${corpus % 4}` });
    dot.style.left = `${along(error)}%`;
    track.append(bar, dot);
  });
  return track;
}

function rejectedList(one) {
  return element("details", {},
    element("summary", { text: `${countText(one.rejected.length, "scheme")} not offered` }),
    element("ul", {}, ...one.rejected.map(([scheme, reason]) =>
      element("li", {}, element("strong", { text: scheme }), ` ${reason}`))));
}

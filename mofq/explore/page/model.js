"use strict";

// What the page holds, and what follows from it. Nothing here touches the document but
// the helpers that make elements; every name from a table becomes text, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const groups = data.groups;
const points = data.points;
const NARROW = window.matchMedia("(max-width: 719px)");

const state = {
  point: 0,
  show: "frontier",
  compare: "none",
  colour: "scheme",
  group: null, // of the panel
  scheme: null, // that the legend points at
  allSchemes: false, // in the legend
};

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") made.textContent = value;
    else if (name === "class") made.className = value || "";
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// A table whose rows become lists of named values where the page is narrow.
function stackedTable(columns, rows) {
  rows.forEach((row) => [...row.children].forEach((cell, place) => {
    if (place) cell.dataset.name = columns[place].textContent ?? columns[place];
  }));
  const heads = columns.map((head) => element("th", { scope: "col" }, head));
  return element("table", { class: "stacked" },
    element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

function byId(id) {
  return document.getElementById(id);
}

// Of one option: [scheme, bytes on the axis, error of each corpus, standard error of each corpus
// or null, bits per weight or per cached number, its line of static maxima in a recipe].
const SCHEME = 0, BYTES = 1, ERRORS = 2, STDERRS = 3, BITS = 4, AMAX = 5;

// The axis: bits per weight; or bytes, where the KV cache of some tokens counts as size.
const HAS_CONTEXT = data.kv_tokens > 0;
const SCALE = points[points.length - 1].at >= 1e9 ? ["GB", 1e9] : ["MB", 1e6];

function axisText(at) {
  return HAS_CONTEXT ? bytesText(Math.round(at)) : bitsText(at);
}

function axisName(short) {
  if (!HAS_CONTEXT) return short ? "bits per weight" : "true bits per weight";
  return short ? "size" : `checkpoint and KV cache of ${countText(data.kv_tokens, "token")}`;
}

// Of a group's option: its part of the axis; of a cache beside it, what a token takes.
function isPerToken(group) {
  return groups[group].cached > 0 && !HAS_CONTEXT;
}

function sizeOf(group, option) {
  return isPerToken(group) ? (option[BITS] * groups[group].cached) / 8 : option[BYTES];
}

function sizeText(group, bytes) {
  return isPerToken(group) ? `${bytesText(bytes)} a token` : bytesText(bytes);
}

// What a corpus counts in the mean, all together 1.
function shareOf(corpus) {
  return data.corpus_weights[corpus] / data.corpus_weights.reduce((sum, weight) => sum + weight, 0);
}

function optionError(option) {
  return option[ERRORS].reduce((sum, error, corpus) => sum + shareOf(corpus) * error, 0);
}

function optionStderr(option) {
  const known = option[STDERRS];
  if (!known || known.some((value) => value === null)) return null;
  return Math.hypot(...known.map((stderr, corpus) => shareOf(corpus) * stderr));
}

// The standard error of a row: of the samples, and what rows measure by themselves.
function rowStderr(error, sampling) {
  if (sampling === null || !data.row_error) return sampling;
  const { spread, growth, largest } = data.row_error;
  return Math.hypot(sampling, error * Math.hypot(spread, growth * Math.min(error, largest)));
}

// A row and half of its 95 % interval; of an error that is no KL its standard error.
function rowText(error, sampling) {
  const text = (data.is_kl ? withInterval : withError)(error, rowStderr(error, sampling));
  return isOutOfRange(error) ? `${text} †` : text;
}

// Whether a row is larger than any that was compared with a measurement.
function isOutOfRange(error) {
  return Boolean(data.row_error) && error > data.row_error.largest;
}

function optionOf(group, scheme) {
  return groups[group].options.find((option) => option[SCHEME] === scheme) || null;
}

// What a point of the frontier predicts, in the unit of the page.
function pointValue(point) {
  return data.is_kl ? point.kl_nats_per_token : point.error;
}

function schemesOfChoice(choice) {
  return choice.map((option, group) => groups[group].options[option][SCHEME]);
}

// A selection by the name that the menus use: "frontier", "reference:2", "corpus:en".
function selection(name) {
  const [kind, rest] = [name.split(":")[0], name.slice(name.indexOf(":") + 1)];
  if (kind === "frontier") {
    const point = points[state.point];
    return {
      label: `the frontier at ${axisText(point.at)}${HAS_CONTEXT ? "" : " bits"}`,
      schemes: schemesOfChoice(point.choice),
    };
  }
  if (kind === "reference") {
    return data.references[Number(rest)];
  }
  if (kind === "corpus") {
    const choice = data.corpus_best[rest][state.point];
    return { label: `the best for ${rest} alone`, schemes: schemesOfChoice(choice) };
  }
  return null;
}

function schemeName(scheme) {
  return data.schemes[scheme].name;
}

// The last point that fits; the first where none does.
function pointAt(at) {
  let found = 0;
  points.forEach((point, number) => {
    if (point.at <= at * (1 + 1e-12)) found = number;
  });
  return found;
}

// A recipe, of lines that mofq.decision.recipe wrote; a test compares it with that of the command.
function recipeText(number) {
  const { header, choice, has_caches: hasCaches } = points[number], layers = [], caches = [];
  choice.forEach((place, group) => {
    const { lines: [before, behind], options, cached } = groups[group], option = options[place];
    const entry = before + data.schemes[option[SCHEME]].line + behind + (option[AMAX] ?? "");
    (cached ? caches : layers).push(entry);
  });
  const { unquantized, caches: cachesLine } = data.recipe;
  return [header, ...layers, unquantized, ...(hasCaches ? [cachesLine, ...caches] : [])].join("");
}

// Numbers as people read them: plain decimals, as in the tables of the command line. A power of
// ten stands only beside what would have five zeros behind its point, or six digits before it.

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const LEAST_PLAIN = 1e-6, MOST_PLAIN = 1e5;

function isPlain(value) {
  return value === 0 || (Math.abs(value) >= LEAST_PLAIN && Math.abs(value) < MOST_PLAIN);
}

function powerText(exponent) {
  const raised = String(Math.abs(exponent)).replace(/\d/g, (digit) => SUPERSCRIPTS[digit]);
  return `·10${exponent < 0 ? "⁻" : ""}${raised}`;
}

// To so many significant digits.
function numberText(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const exponent = value === 0 ? 0 : Math.floor(Math.log10(Math.abs(value)));
  const text = isPlain(value) ? value.toFixed(value === 0 ? 0 : Math.max(0, digits - 1 - exponent))
    : (value / 10 ** exponent).toFixed(digits - 1) + powerText(exponent);
  return text.replace("-", "−");
}

// To two digits of the standard error.
function withError(value, stderr) {
  if (value === null || value === undefined || !stderr) return numberText(value);
  const exponent = isPlain(value) ? 0 : Math.floor(Math.log10(Math.abs(value)));
  const [shown, bar] = [value, stderr].map((one) => one / 10 ** exponent);
  const decimals = Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(bar))));
  const text = `${shown.toFixed(decimals)} ± ${bar.toFixed(decimals)}`.replace("-", "−");
  return exponent === 0 ? text : `(${text})${powerText(exponent)}`;
}

// A prediction and half of its 95 % interval.
function withInterval(value, stderr) {
  return withError(value, stderr && 2 * stderr);
}

function signedText(value, text) {
  return value > 0 ? `+${text(value)}` : text(value);
}

function bitsText(bits) {
  return bits.toFixed(bits < 10 ? 3 : 2);
}

function bytesText(bytes) {
  const size = Math.abs(bytes), sign = bytes < 0 ? "−" : "";
  for (const [name, unit] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (size >= unit) return `${sign}${(size / unit).toPrecision(4)} ${name}`;
  }
  return `${sign}${size} B`;
}

// Of a round number: without the zeros behind its point.
function roundBytesText(bytes) {
  return bytesText(bytes).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
}

function countText(count, one, many) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many || `${one}s`}`;
}

const UNITS = {
  kl_nats_per_token: ["KL", "nats per token"],
  output_mse: ["Output error", "squared output units"],
  relative_weight_error: ["Weight error", "relative"],
};
const [QUANTITY, UNIT] = UNITS[data.unit] || [data.unit, ""];
const ROW_QUANTITY = data.is_kl ? `${QUANTITY}, 95 %` : QUANTITY;

// An error with its unit, where the unit is a word that can follow a number.
function amount(text) {
  return data.is_kl ? `${text} ${UNIT}` : text;
}

// Colours: a hue for each element format, a lightness for each of its schemes.

const HUES = [255, 45, 150, 330, 95, 200, 295, 15];

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function schemeColours() {
  const dark = isDark();
  const elements = [...new Set(data.schemes.map((one) => one.element))].filter(
    (name) => name !== "bf16",
  );
  const family = new Map();
  data.schemes.forEach((one, scheme) => {
    if (!family.has(one.element)) family.set(one.element, []);
    family.get(one.element).push(scheme);
  });
  return data.schemes.map((one, scheme) => {
    if (one.name === "bf16") return dark ? "oklch(0.86 0 0)" : "oklch(0.32 0 0)";
    const members = family.get(one.element);
    const place = members.length === 1 ? 0.5 : members.indexOf(scheme) / (members.length - 1);
    const number = elements.indexOf(one.element);
    const hue = HUES[number % HUES.length] + (place - 0.5) * 34;
    const lightness = (dark ? 0.42 : 0.84) + (dark ? 0.4 : -0.42) * place;
    const chroma = number < 0 ? 0.02 : 0.1 + 0.09 * (1 - Math.abs(place - 0.5));
    return `oklch(${lightness.toFixed(3)} ${chroma.toFixed(3)} ${((hue + 360) % 360).toFixed(1)})`;
  });
}

let colours = schemeColours();

function swatch(scheme) {
  const made = element("span", { class: "swatch", "aria-hidden": "true" });
  made.style.background = colours[scheme];
  return made;
}

// The tip beside the pointer or the focused cell.

function showTip(x, y, ...children) {
  const tip = byId("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const right = x + 14 + width > document.documentElement.clientWidth - 8;
  const left = right ? Math.max(8, x - 14 - width) : x + 14;
  const top = Math.min(Math.max(8, y - height / 2), Math.max(8, window.innerHeight - height - 8));
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

function tipOfPairs(event, lines) {
  showTip(event.clientX, event.clientY, element("dl", { class: "pairs" },
    ...lines.flatMap(([name, value]) => [element("dt", { text: name }), element("dd", { text: value })])));
}

function hideTip() {
  byId("tip").hidden = true;
}

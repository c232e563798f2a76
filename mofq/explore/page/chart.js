// The frontier, drawn by uPlot; the points beside it are drawn on the same canvas.

let chart = null;

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Every point beside the frontier: {kind, label, at, value, stderr, from?, isNamed?}.
function marks() {
  const references = data.references.filter((one) => one.at !== null && one.value !== null);
  const measured = !data.is_kl ? [] : placedMeasurements().map((one) => ({
    kind: "measured",
    label: one.reference === null ? one.label : data.references[one.reference].label,
    isNamed: references.includes(data.references[one.reference]), // at its prediction
    at: one.at,
    value: one.kl_nats_per_token,
    stderr: one.kl_stderr,
    from: one.predicted,
    fromStderr: one.predicted_stderr,
    text: one.text,
  }));
  return [...references, ...measured];
}

// A validation says nothing of a context; without the recipe of its name it has no place.
function placedMeasurements() {
  return data.measured.filter((one) => one.at !== null);
}

function isLog() {
  return byId("log").checked;
}

// The part of the axis that is drawn: all of it, or as far as something but bf16 is to be compared.
function axisRange() {
  const others = data.references
    .filter((one) => one.label !== "bf16" && one.at !== null)
    .map((one) => one.at)
    .concat(placedMeasurements().map((one) => one.at));
  const least = Math.min(points[0].at, ...others);
  let most = Math.max(points[points.length - 1].at, ...others);
  if (!byId("whole").checked && others.length) {
    const some = HAS_CONTEXT ? 0 : 0.5;
    most = Math.min(most, Math.max(...others) + Math.max(some, (Math.max(...others) - least) / 2));
  }
  const margin = (most - least || 1) * 0.03;
  return [least - margin, most + margin];
}

function valueRange() {
  const [least, most] = axisRange();
  const drawn = points.filter((one) => one.at >= least && one.at <= most);
  const values = [...drawn.map(pointValue), ...marks().map((one) => one.value)];
  const largest = Math.max(...values) || 1;
  if (!isLog()) return [0, largest * 1.08];
  const positive = values.filter((value) => value > 0);
  const smallest = Math.max(Math.min(...positive), largest / 1e4);
  return [smallest / 1.6, largest * 1.6];
}

function chartData() {
  const floor = isLog() ? valueRange()[0] / 10 : 0;
  const shown = (value) => (isLog() && !(value > 0) ? null : value);
  const stderr = (one) => (data.is_kl ? one.kl_stderr || 0 : 0);
  return [
    points.map((one) => one.at),
    points.map((one) => shown(pointValue(one) + 2 * stderr(one))),
    points.map((one) => (shown(pointValue(one)) === null ? null
      : Math.max(pointValue(one) - 2 * stderr(one), floor))),
    points.map((one) => shown(pointValue(one))),
  ];
}

function tickText(value) {
  // A log axis also marks its end, which is no round number.
  if (value === null || (isLog() && Math.abs(value / Number(value.toPrecision(1)) - 1) > 1e-9)) return "";
  return isPlain(value) ? String(Number(value.toPrecision(3))) : numberText(value, 1);
}

function axis(label, more) {
  return {
    label,
    stroke: () => cssColour("--muted"),
    grid: { stroke: () => cssColour("--grid"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    labelSize: 20,
    ...more,
  };
}

// Bytes of the checkpoint at some bits per weight: what is not a weight of the groups is always there.
function sizeAt(bits) {
  return points[0].checkpoint_bytes + ((bits - points[0].bits_per_weight) * data.weights) / 8;
}

// Round sizes that are far enough from each other, as bits per weight.
function sizeTicks(u) {
  const [least, most] = [sizeAt(u.scales.x.min), sizeAt(u.scales.x.max)];
  const rough = (most - least) / Math.max(2, u.width / 150), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let size = Math.ceil(least / step) * step; size <= most; size += step) {
    ticks.push(points[0].bits_per_weight + (8 * (size - points[0].checkpoint_bytes)) / data.weights);
  }
  return ticks;
}

function makeChart() {
  if (chart) chart.destroy();
  const host = byId("chart");
  chart = new uPlot({
    width: host.clientWidth,
    height: host.clientHeight,
    legend: { show: false },
    cursor: { points: { show: false }, drag: { x: true, y: false }, x: true, y: false },
    scales: {
      x: { time: false, range: (u, from, to) => zoomed(u, from, to) },
      y: { distr: isLog() ? 3 : 1, range: () => valueRange() },
    },
    axes: [
      axis(axisName(false), { size: 34, ...(HAS_CONTEXT
        ? { values: (u, ticks) => ticks.map((size) => roundBytesText(Math.round(size))) } : {}) }),
      ...(HAS_CONTEXT ? [] : [axis("checkpoint", { scale: "x", side: 0, size: 22, labelSize: 16, grid: { show: false },
        splits: (u) => sizeTicks(u), values: (u, ticks) => ticks.map((bits) => roundBytesText(Math.round(sizeAt(bits)))) })]),
      axis(UNIT ? `${QUANTITY}, ${UNIT}` : QUANTITY, { scale: "y",
        size: 56, values: (u, ticks) => ticks.map(tickText) }),
    ],
    series: [
      {},
      { stroke: "transparent", points: { show: false } },
      { stroke: "transparent", points: { show: false } },
      { stroke: () => cssColour("--accent"), width: 2, points: { show: false } },
    ],
    bands: [{ series: [1, 2], fill: () => cssColour("--band") }],
    hooks: { draw: [drawMarks] },
  }, chartData(), host);
  chart.over.addEventListener("click", pickFromChart);
  chart.over.addEventListener("pointermove", (event) => tipOfChart(event));
  chart.over.addEventListener("pointerleave", hideTip);
}

// The usual range, unless a part of it was dragged out.
function zoomed(u, from, to) {
  const first = points[0].at, last = points[points.length - 1].at;
  return from === null || (from <= first && to >= last) ? axisRange() : [from, to];
}

function shape(context, kind, x, y, size) {
  context.beginPath();
  if (kind === "greedy") {
    context.rect(x - size * 0.8, y - size * 0.8, size * 1.6, size * 1.6);
  } else if (kind === "uniform") {
    context.moveTo(x, y - size);
    context.lineTo(x + size, y);
    context.lineTo(x, y + size);
    context.lineTo(x - size, y);
    context.closePath();
  } else if (kind === "recipe") {
    context.moveTo(x, y - size);
    context.lineTo(x + size, y + size * 0.8);
    context.lineTo(x - size, y + size * 0.8);
    context.closePath();
  } else {
    context.arc(x, y, size * 0.85, 0, 2 * Math.PI);
  }
}

const MARK_COLOURS = { uniform: "--text", greedy: "--fourth", recipe: "--second", measured: "--third" };

function place(u, spot, value) {
  if (isLog() && !(value > 0)) return null;
  return [u.valToPos(spot, "x", true), u.valToPos(value, "y", true)];
}

function errorBar(u, context, one, at) {
  if (!one.stderr) return;
  const floor = u.bbox.top + u.bbox.height;
  const low = place(u, one.at, one.value - 2 * one.stderr);
  const high = place(u, one.at, one.value + 2 * one.stderr);
  context.beginPath();
  context.moveTo(at[0], low === null ? floor : low[1]);
  context.lineTo(at[0], high[1]);
  context.stroke();
}

function drawMarks(u) {
  const context = u.ctx, ratio = devicePixelRatio;
  context.save();
  context.beginPath();
  context.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
  context.clip();
  const taken = [], labels = [];
  drawCurrent(u, context, ratio, taken);
  // Those that were asked for are named before the uniform ones.
  const rank = { measured: 0, recipe: 0, greedy: 1, uniform: 2 };
  const sorted = marks().sort((a, b) => rank[a.kind] - rank[b.kind]);
  for (const one of sorted.reverse()) {
    const at = place(u, one.at, one.value);
    if (at === null) continue;
    const colour = cssColour(MARK_COLOURS[one.kind]);
    context.strokeStyle = context.fillStyle = colour;
    context.lineWidth = ratio;
    errorBar(u, context, one, at);
    const from = one.from ? place(u, one.at, one.from) : null;
    if (from) {
      context.setLineDash([2 * ratio, 3 * ratio]);
      context.beginPath();
      context.moveTo(...at);
      context.lineTo(...from);
      context.stroke();
      context.setLineDash([]);
    }
    shape(context, one.kind, ...at, 5 * ratio);
    context.fill();
    const near = 6 * ratio;
    taken.push([at[0] - near, at[1] - near, at[0] + near, at[1] + near]);
    if (!one.isNamed) addLabel(labels, one.label, at, colour, ratio);
  }
  drawLabels(u, context, ratio, labels.reverse(), taken);
  context.restore();
}

// Points of one kind at one place have one label together.
function addLabel(labels, text, at, colour, ratio) {
  const same = labels.find((one) => one.colour === colour
    && Math.hypot(one.at[0] - at[0], one.at[1] - at[1]) < 3 * ratio);
  if (same) same.text = `${text}, ${same.text}`;
  else labels.push({ text, at, colour });
}

function drawCurrent(u, context, ratio, taken) {
  const point = points[state.point];
  const x = u.valToPos(point.at, "x", true);
  context.strokeStyle = cssColour("--accent");
  context.lineWidth = ratio;
  context.beginPath();
  context.moveTo(x, u.bbox.top);
  context.lineTo(x, u.bbox.top + u.bbox.height);
  context.stroke();
  const at = place(u, point.at, pointValue(point));
  if (at === null) return;
  context.beginPath();
  context.arc(...at, 7 * ratio, 0, 2 * Math.PI);
  context.fillStyle = cssColour("--surface");
  context.fill();
  context.lineWidth = 3 * ratio;
  context.stroke();
  taken.push([at[0] - 8 * ratio, at[1] - 8 * ratio, at[0] + 8 * ratio, at[1] + 8 * ratio]);
}

// Each label where it covers nothing; none where there is no room (the tip has it).
function drawLabels(u, context, ratio, labels, taken) {
  context.font = `${11 * ratio}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  context.textAlign = "left";
  const right = u.bbox.left + u.bbox.width, bottom = u.bbox.top + u.bbox.height;
  for (const { text: whole, at: [x, y], colour } of labels) {
    const text = whole.length > 44 ? `${whole.slice(0, 43)}…` : whole;
    const width = context.measureText(text).width, half = 7 * ratio, gap = 9 * ratio;
    const places = [[x + gap, y], [x - gap - width, y], [x - width / 2, y - 2 * half],
      [x - width / 2, y + 2 * half], [x + gap, y - 2 * half], [x + gap, y + 2 * half]];
    const free = places.find(([left, middle]) => {
      const box = [left, middle - half, left + width, middle + half];
      return box[0] >= u.bbox.left && box[2] <= right && box[1] >= u.bbox.top && box[3] <= bottom
        && !taken.some((other) => box[0] < other[2] && other[0] < box[2]
          && box[1] < other[3] && other[1] < box[3]);
    });
    if (!free) continue;
    taken.push([free[0], free[1] - half, free[0] + width, free[1] + half]);
    context.lineWidth = 3 * ratio;
    context.lineJoin = "round";
    context.strokeStyle = cssColour("--surface");
    context.strokeText(text, ...free);
    context.fillStyle = colour;
    context.fillText(text, ...free);
  }
}

function pointOfPixel(left) {
  let nearest = 0, least = Infinity;
  points.forEach((point, number) => {
    const distance = Math.abs(chart.valToPos(point.at, "x") - left);
    if (distance < least) [nearest, least] = [number, distance];
  });
  return nearest;
}

function pickFromChart(event) {
  if (chart.select.width > 0) return;
  const box = chart.over.getBoundingClientRect();
  setPoint(pointOfPixel(event.clientX - box.left));
}

function tipOfChart(event) {
  const box = chart.over.getBoundingClientRect();
  const [left, top] = [event.clientX - box.left, event.clientY - box.top];
  const near = marks().find((one) => (!isLog() || one.value > 0)
    && Math.hypot(chart.valToPos(one.at, "x") - left, chart.valToPos(one.value, "y") - top) < 10);
  const lines = near ? [
    [near.label, near.kind === "measured" ? `measured on ${near.text}` : near.kind],
    [axisName(true), axisText(near.at)],
    [QUANTITY, (near.kind === "measured" ? withError : withInterval)(near.value, near.stderr)],
    ...(near.from ? [["predicted, 95 %", withInterval(near.from, near.fromStderr)]] : []),
  ] : frontierLines(points[pointOfPixel(left)]);
  tipOfPairs(event, lines);
}

function frontierLines(point) {
  return [
    ["frontier", "click to take"],
    [axisName(true), axisText(point.at)],
    ...(HAS_CONTEXT ? [["bits per weight", bitsText(point.bits_per_weight)]] : []),
    ...(data.cached ? [["bits per cached number", bitsText(point.kv_bits)]] : []),
    [data.is_kl ? `${QUANTITY}, 95 %` : QUANTITY, withInterval(pointValue(point), data.is_kl ? point.kl_stderr : null)],
  ];
}

function makeKey() {
  const kinds = new Set(marks().map((one) => one.kind));
  const all = [
    ["line", data.is_kl ? "frontier, predicted, 95 % interval" : "frontier"],
    ...(kinds.has("uniform") ? [["uniform", "one scheme for every layer"]] : []),
    ...(kinds.has("greedy") ? [["greedy", "greedy, at the size of a uniform scheme"]] : []),
    ...(kinds.has("recipe") ? [["recipe", "compared recipe"]] : []),
    ...(kinds.has("measured") ? [["measured", "measured, dotted to its prediction"]] : []),
  ];
  byId("key").replaceChildren(...all.map(([kind, text]) =>
    element("li", {}, element("span", { class: `mark ${kind}`, "aria-hidden": "true" }), text)));
}

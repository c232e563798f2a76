// The weights and inputs of a fusion group along the input channels.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 100; // of a profile in its own units

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Magnitudes of every range of channels; see `mofq.explore.channel_profiles`.
function magnitudes(extent, name) {
  const steps = Uint8Array.from(atob(extent[name]), (character) => character.charCodeAt(0));
  if (extent.most === 0) return Array.from(steps, () => 0);
  const scale = Math.log(extent.most / extent.least) / 255;
  return Array.from(steps, (step) => extent.least * Math.exp(scale * step));
}

// At least two decades: what is flat looks flat, and a wall stands out.
function heightOf(extent) {
  const most = Math.log(extent.most || 1) + Math.log(1.15);
  const least = Math.min(Math.log(extent.least || 1), most - Math.log(100)) - Math.log(1.1);
  return (value) => (HEIGHT * (Math.log(Math.max(value, 1e-300)) - least)) / (most - least);
}

// One step for each range of channels, from the floor.
function area(values, height) {
  const tops = values.map((value, bin) => {
    const y = (HEIGHT - Math.max(0, height(value))).toFixed(1);
    return `L${bin} ${y}H${bin + 1}`;
  });
  return `M0 ${HEIGHT}${tops.join("")}V${HEIGHT}Z`;
}

function profileChart(title, extent, channels, whole) {
  const amax = magnitudes(extent, "amax"), rms = magnitudes(extent, "rms");
  const height = heightOf(extent), width = Math.ceil(channels / amax.length);
  const median = [...rms].sort((a, b) => a - b)[rms.length >> 1];
  const picture = svg("svg", {
    viewBox: `0 0 ${amax.length} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${title}: largest ${numberText(extent.most)}, typical ${numberText(median)}`,
  }, svg("path", { class: "amax", d: area(amax, height) }), svg("path", { class: "rms", d: area(rms, height) }));
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const bin = Math.min(amax.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * amax.length)));
    const last = Math.min(channels, (bin + 1) * width) - 1;
    tipOfPairs(event, [
      [last > bin * width ? "input channels" : "input channel", last > bin * width ? `${bin * width} to ${last}` : String(last)],
      ["largest magnitude", numberText(amax[bin])],
      ["root mean square", numberText(rms[bin])],
    ]);
  });
  picture.addEventListener("pointerleave", hideTip);
  const crest = Object.entries(extent.crest).reverse()
    .map(([name, value]) => `${numberText(value, 2)} ${name === whole ? `a ${whole}` : `in ${name}`}`);
  return element("figure", { class: "profile" },
    element("figcaption", {}, element("strong", { text: title }),
      element("span", { text: `largest ${numberText(extent.most)}` }),
      element("span", { class: extent.wall >= 5 ? "walls" : null, text: `highest channel ${wallText(extent)} the typical` })),
    picture,
    element("div", { class: "ends" }, element("span", { text: "0" }),
      element("span", { text: "input channel" }), element("span", { text: String(channels - 1) })),
    crest.length ? element("p", { class: "small", text: `crest factor ${crest.join(", ")}` }) : null);
}

function wallText(extent) {
  return `${numberText(extent.wall, extent.wall < 10 ? 2 : 3)}×`;
}

// The profiles of a group's panel.
function profileSection(one) {
  if (!one.profile.layers.length) return null;
  const charts = [];
  one.profile.layers.forEach(([module, channels, weight, number], place) => {
    charts.push(profileChart(`${module} weights`, weight, channels, "channel"));
    const later = one.profile.layers.slice(place + 1).some((other) => other[3] === number);
    if (later) return; // layers that read the same inputs are followed by them once
    for (const [corpus, extent] of Object.entries(one.profile.inputs[number])) {
      const several = data.corpora.length > 1 ? `, ${corpus}` : "";
      const readers = one.profile.layers.filter((other) => other[3] === number).map((other) => other[0]);
      charts.push(profileChart(`inputs of ${readers.join(", ")}${several}`, extent, channels, "token"));
    }
  });
  return element("div", { class: "profiles" },
    element("h3", { text: "Weights and inputs along the input channels" }),
    element("p", { class: "small" },
      element("span", { class: "mark amax", "aria-hidden": "true" }), " largest magnitude ",
      element("span", { class: "mark rms", "aria-hidden": "true" }), " root mean square, on a log scale. "
      + "A channel in which both rise is a wall, one in which only the first does has a few large values."),
    element("div", { class: "charts" }, ...charts));
}

// The highest wall of a group, of its weights or of its inputs.
function wallOf(one, kind) {
  const extents = kind === "weights" ? one.profile.layers.map((layer) => layer[2])
    : one.profile.inputs.flatMap((corpora) => Object.values(corpora));
  return extents.length ? Math.max(...extents.map((extent) => extent.wall)) : null;
}

function hasWalls(kind) {
  return groups.some((one) => wallOf(one, kind) !== null);
}

// Why INT or FP: the other one of the same size, and how the values lie in their scale groups.
function numberSentence(group, chosen) {
  const here = optionOf(group, chosen), kind = data.schemes[chosen].number;
  const others = groups[group].options.filter((option) => data.schemes[option[SCHEME]].number
    && data.schemes[option[SCHEME]].number !== kind
    && Math.abs(option[BYTES] / here[BYTES] - 1) < 0.02);
  if (!kind || !others.length || !(optionError(here) > 0)) return null;
  const best = others.reduce((a, b) => (optionError(b) < optionError(a) ? b : a));
  const ratio = optionError(best) / optionError(here);
  const crest = crestOf(groups[group], data.schemes[chosen]);
  return `${data.schemes[best[SCHEME]].number} of the same size: ${schemeName(best[SCHEME])}, `
    + `${numberText(ratio, 2)}× this error.`
    + (crest ? ` ${crest}. INT, with even steps, loses by the square of a crest factor, FP hardly.` : "");
}

// The crest factors within what shares a scale under a scheme.
function crestOf(one, scheme) {
  const parts = [];
  const of = (extents, name) => {
    const known = extents.map((extent) => extent.crest[name]).filter((value) => value !== undefined);
    return known.length ? numberText(Math.max(...known), 2) : null;
  };
  const weights = of(one.profile.layers.map((layer) => layer[2]), scheme.weight);
  const inputs = of(one.profile.inputs.flatMap((corpora) => Object.values(corpora)), scheme.activation);
  if (weights) parts.push(`${weights} for the weights that share a scale`);
  if (inputs) parts.push(`${inputs} for the inputs that do`);
  return parts.length ? `Crest factor ${parts.join(", ")}` : null;
}

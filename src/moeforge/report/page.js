"use strict";
// Values under the pointer. The drawn paths themselves hold the data: pixels are turned back into numbers.
const tip = document.getElementById("tip");
const show = (v) => !isFinite(v) ? "–" : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2)
  : Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(4)));

function points(id) {
  const path = document.querySelector(`[id="${id}"] path[d]:not(defs path)`);
  if (!path) return [];
  return [...path.getAttribute("d").matchAll(/[ML]\s*(-?[\d.]+)\s+(-?[\d.]+)/g)].map((m) => [+m[1], +m[2]]);
}

function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle][0] < x) low = middle; else high = middle;
  }
  return x - list[low][0] < list[high][0] - x ? list[low] : list[high];
}

function value(area, [px, py]) {
  const [x, y, width, height] = area.box, up = (y + height - py) / height, [a, b] = area.y;
  return [area.x[0] + (px - x) / width * (area.x[1] - area.x[0]),
    area.log ? a * Math.pow(b / a, up) : a + up * (b - a)];
}

function tell(event, lines) {
  tip.replaceChildren(...lines.map(([label, text, color]) => {
    const row = document.createElement("div"), name = document.createElement("span"), number = document.createElement("b");
    if (color) {
      name.className = "key";
      name.style.setProperty("--c", color);
      name.append(document.createElement("i"));
    } else row.className = "at";
    name.append(label);
    number.append(text);
    row.append(name, number);
    return row;
  }));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - height - 8)}px`;
}

for (const figure of document.querySelectorAll("figure:has(svg)")) {
  const data = JSON.parse(figure.querySelector("script").textContent), svg = figure.querySelector("svg");
  const marks = document.createElementNS(svg.namespaceURI, "g");
  svg.append(marks);
  let lines = null;
  const clear = () => {
    tip.hidden = true;
    marks.replaceChildren();
    svg.querySelectorAll(".dim").forEach((line) => line.classList.remove("dim"));
  };
  const add = (kind, attributes) => {
    const mark = document.createElementNS(svg.namespaceURI, kind);
    for (const [name, text] of Object.entries(attributes)) mark.setAttribute(name, text);
    marks.append(mark);
  };
  const move = (event) => {
    clear();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const index = data.axes.findIndex(({ box: [x, y, w, h] }) => at.x >= x - 6 && at.x <= x + w + 6 && at.y >= y - 6 && at.y <= y + h + 6);
    if (index < 0) return;
    const area = data.axes[index];
    if (data.cells) {
      const [layer, expert] = value(area, [at.x, at.y]).map(Math.round), share = data.cells.values[layer]?.[expert];
      if (share !== undefined) tell(event, [[`layer ${data.cells.layers[layer]}, expert ${expert}`, ""], ["load", `${show(share)} × even`, "transparent"]]);
      return;
    }
    lines ??= data.axes.map((one) => one.series.map((series) => ({ ...series, list: points(series.id) })).filter((s) => s.list.length));
    let found = lines[index].map((series) => ({ ...series, point: nearest(series.list, at.x) }));
    if (!found.length) return;
    if (data.nearest) {
      found = [found.reduce((best, one) => Math.abs(one.point[1] - at.y) < Math.abs(best.point[1] - at.y) ? one : best)];
      for (const series of lines[index]) if (series.id !== found[0].id) document.getElementById(series.id).classList.add("dim");
    }
    const [, top, , height] = area.box, x = found[0].point[0];
    add("line", { class: "rule", x1: x, x2: x, y1: top, y2: top + height });
    for (const { point, color } of found) add("circle", { class: "point", cx: point[0], cy: point[1], r: 4, style: `fill: ${color}` });
    tell(event, [[area.xname, show(Math.round(value(area, found[0].point)[0]))],
      ...found.map(({ label, point, color }) => [label, show(value(area, point)[1]), color])]);
  };
  figure.querySelector(".chart").addEventListener("pointermove", move);
  figure.querySelector(".chart").addEventListener("pointerleave", clear);
}

"use strict";
// Legends switch series on and off; values under the pointer are shown. All text is set as text.
const tip = document.getElementById("tip");
const put = (parent, name, classes, text) => {
  const made = parent.appendChild(document.createElement(name));
  made.className = classes;
  made.append(text);
  return made;
};
function show(event, rows) {
  tip.replaceChildren();
  for (const [text, colour] of rows) {
    const row = put(tip, "div", colour ?? "", "");
    if (colour) put(row, "i", "", "");
    row.append(text);
  }
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
}
function hide(...others) {
  for (const each of [tip, ...others]) each.style.display = "none";
}
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", on);
    const figure = button.closest("figure");
    for (const part of figure.querySelectorAll(`[data-group="${button.dataset.of}"]`)) part.classList.toggle("off", !on);
  });
}
for (const plot of document.querySelectorAll(".plot")) {
  const cross = plot.querySelector(".cross");
  const series = [...plot.querySelectorAll("g[data-points]")].map((g) => ({ g, points: JSON.parse(g.dataset.points) }));
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = (100 * (event.clientX - box.left)) / box.width;
    const near = series
      .filter((each) => !each.g.classList.contains("off") && each.points.length)
      .map((each) => [each, each.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))]);
    if (!near.length) return hide(cross);
    const best = near.reduce((a, b) => (Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a))[1];
    cross.style.left = `${best[0]}%`;
    cross.style.display = "block";
    const rows = near.filter(([, point]) => Math.abs(point[0] - best[0]) < 3).map(([each, point]) => {
      const where = point[2] === best[2] ? "" : ` at ${point[2]}`;
      return [`${each.g.dataset.name}: ${point[3]}${where}`, each.g.dataset.colour];
    });
    show(event, [[`${plot.dataset.label} ${best[2]}`], ...rows]);
  });
  plot.addEventListener("pointerleave", () => hide(cross));
}
for (const mark of document.querySelectorAll("[data-tip]")) {
  mark.addEventListener("pointermove", (event) => show(event, [[mark.dataset.tip]]));
  mark.addEventListener("pointerleave", () => hide());
}
for (const cells of document.querySelectorAll(".cells")) {
  const { rows, columns, cells: said } = JSON.parse(cells.dataset.cells);
  const hit = cells.querySelector(".hit");
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    const at = (place, start, size, count) => Math.max(0, Math.min(count - 1, Math.floor((count * (place - start)) / size)));
    const row = at(event.clientY, box.top, box.height, rows.length);
    const column = at(event.clientX, box.left, box.width, columns.length);
    Object.assign(hit.style, { display: "block", left: `${(100 * column) / columns.length}%`, width: `${100 / columns.length}%`,
      top: `${(100 * row) / rows.length}%`, height: `${100 / rows.length}%` });
    show(event, [[`${cells.dataset.row}: ${rows[row]}`], [`${cells.dataset.column}: ${columns[column]}`], [said[row][column] || "0"]]);
  });
  cells.addEventListener("pointerleave", () => hide(hit));
}

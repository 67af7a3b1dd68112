// Draws marks on frame 0. The component's value is the list of them (session.Mark), in pixels of the picture.
let tool = "look", mark = null;
const svg = () => element.querySelector("svg[data-frame='0']");
const place = (event) => {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg().getScreenCTM().inverse());
  const {width, height} = svg().viewBox.baseVal;
  return [Math.round(Math.min(Math.max(point.x, 0), width)), Math.round(Math.min(Math.max(point.y, 0), height))];
};
const shape = ({kind, points}, index) => {
  const [x, y] = points[0], [u, v] = points.at(-1), {width, height} = svg().viewBox.baseVal;
  const unit = Math.max(width, height) / 512, left = Math.min(x, u), top = Math.min(y, v);  // as region_masks has it
  const drawn = {
    point: `<circle cx="${x}" cy="${y}" r="${20 * unit}"/>`,
    box: `<rect x="${left}" y="${top}" width="${Math.abs(u - x)}" height="${Math.abs(v - y)}"/>`,
    brush: `<polyline points="${points.join(" ")} ${u + 0.1},${v}" stroke-width="${40 * unit}"/>`,
  }[kind];
  const size = 15 * unit, up = Math.max(top - (kind == "box" ? 4 : 24) * unit, size);
  return `<g>${drawn}<text x="${Math.min(left, width - 4.5 * size)}" y="${up}" font-size="${size}">region${index + 1}</text></g>`;
};
const draw = () => {
  for (const button of element.querySelectorAll("[data-tool]"))
    button.classList.toggle("chosen", button.dataset.tool == tool);
  element.querySelector(".picture").classList.toggle("drawing", tool != "look" && !!svg());
  const layer = element.querySelector(".marks"), marks = [...(props.value || []), ...(mark ? [mark] : [])];
  if (layer) layer.innerHTML = svg() ? marks.map(shape).join("") : "";
};
const finish = (marks) => { mark = null; props.value = marks; draw(); };
element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-tool]")?.dataset.tool;
  if (chosen == "clear") finish([]);
  else if (chosen) { tool = chosen; draw(); }
});
element.addEventListener("pointerdown", (event) => {
  if (tool == "look" || !svg()?.contains(event.target)) return;
  event.preventDefault();
  mark = {kind: tool, points: [place(event)]};
  draw();
});
element.addEventListener("pointermove", (event) => {
  if (!mark || !svg()) return;
  mark.points = {point: [place(event)], box: [mark.points[0], place(event)], brush: [...mark.points, place(event)]}[tool];
  draw();
});
window.addEventListener("pointerup", () => { if (mark) finish([...(props.value || []), mark]); });
watch(["value", "picture"], draw);
draw();

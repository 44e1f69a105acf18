// Values under the pointer, or at the place that the arrow keys chose, of every chart.
for (const figure of document.querySelectorAll("figure.chart")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg.plot");
  const tip = figure.querySelector(".tip");
  const cursor = svg.querySelector(".cursor");
  const [left, right] = chart.frame;
  const [low, high] = chart.x_range;
  const stops = [...new Set(chart.lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
  let stop = stops.length - 1;

  const written = (value) => (chart.percent ? (100 * value).toFixed(1) + " %" : Number(value.toPrecision(4)).toString());

  const show = () => {
    const x = stops[stop];
    const place = left + ((right - left) * (x - low)) / (high - low);
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, place);
    cursor.style.visibility = "visible";
    const rows = document.createElement("dl");
    const add = (kind, text) => {
      const made = document.createElement(kind);
      made.textContent = text;
      rows.append(made);
      return made;
    };
    add("dt", chart.x_label);
    add("dd", Number(x.toPrecision(6)).toString());
    for (const line of chart.lines) {
      const point = line.points.find(([at]) => at === x);
      if (!point) continue;
      add("dt", line.name);
      add("dd", written(point[1])).dataset.value = point[1];
    }
    tip.replaceChildren(rows);
    tip.hidden = false;
    const onTheRight = place > (left + right) / 2;
    tip.style.left = onTheRight ? "3rem" : "auto";
    tip.style.right = onTheRight ? "auto" : ".5rem";
  };
  const hide = () => {
    tip.hidden = true;
    cursor.style.visibility = "hidden";
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = low + ((high - low) * (at - left)) / (right - left);
    stop = stops.reduce((best, value, index) => (Math.abs(value - x) < Math.abs(stops[best] - x) ? index : best), 0);
    show();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", show);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: stop - 1, ArrowRight: stop + 1, Home: 0, End: stops.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    stop = Math.min(Math.max(moves[event.key], 0), stops.length - 1);
    show();
  });
}

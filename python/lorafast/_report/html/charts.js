"use strict";
{
  const element = document.getElementById("charts");
  const given = element.textContent;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Some colors would hardly be seen on a dark ground.
  const onDark = Object.entries(JSON.parse(element.dataset.onDark));
  // Paper is white whatever the screen; its width in pixels is that of a page of A4, or of half.
  let printing = false;
  const PAPER = { wide: 640, half: 310 };
  const read = () => JSON.parse(dark.matches && !printing
    ? onDark.reduce((text, [light, color]) => text.replaceAll(light, color), given) : given);
  let charts = read();
  // Below this width names would leave no room for the cells of the matrix.
  const NAMES = 640;
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const theme = () => ({
    axis: { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line") },
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12, color: color("--text") },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--quiet"), activecolor: color("--text") },
      hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--text") } },
    },
  });
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]] };
  const laidOut = (chart, place) => {
    const { axis, layout } = theme();
    const width = printing ? (place.closest(".wide") ? PAPER.wide : PAPER.half) : place.clientWidth;
    const narrow = chart.traces[0].names && width < NAMES;
    const named = narrow ? { showticklabels: false } : {};
    // Its cells are squares; what is higher than wide would be empty.
    const height = narrow ? Math.min(chart.height, width)
      : printing ? Math.min(chart.height, PAPER.wide) : chart.height;
    place.style.height = height + "px";
    return {
      ...layout,
      height,
      ...(printing ? { width } : {}),
      margin: { l: 60, r: 20, t: 30, b: 50 },
      legend: { orientation: "h", y: -0.27 },
      ...chart.layout,
      xaxis: { ...axis, ...chart.layout.xaxis, ...named },
      yaxis: { ...axis, ...chart.layout.yaxis, ...named },
    };
  };
  const follow = (place, trace) => {
    const output = place.parentElement.querySelector("output");
    place.on("plotly_hover", (event) => {
      const { x, y, z } = event.points[0];
      const none = x === y ? "the same adapter" : "no cosine";
      // Rounded first, and zero added, so that no zero has a minus.
      const value = z === null || z === undefined ? none : "cosine " + (Math.round(z * 1e4) / 1e4 + 0).toFixed(4);
      output.innerHTML = "<b>" + trace.names[y] + "</b> and <b>" + trace.names[x] + "</b>: " + value;
    });
  };
  // Zooming is for a pointer: its buttons are no tab stops.
  const quiet = (place) => {
    for (const button of place.querySelectorAll(".modebar-btn")) button.tabIndex = -1;
  };
  charts.forEach((chart, index) => {
    const place = document.getElementById("chart-" + index);
    Plotly.newPlot(place, chart.traces, laidOut(chart, place), config);
    quiet(place);
    if (chart.traces[0].names) follow(place, chart.traces[0]);
  });
  const draw = () => charts.forEach((chart, index) => {
    const place = document.getElementById("chart-" + index);
    Plotly.react(place, chart.traces, laidOut(chart, place), config);
    quiet(place);
  });
  dark.addEventListener("change", () => {
    charts = read();
    draw();
  });
  const print = (now) => {
    printing = now;
    document.documentElement.classList.toggle("printing", now);
    charts = read();
    draw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  let width = innerWidth;
  addEventListener("resize", () => {
    if ((width < NAMES) !== (innerWidth < NAMES)) draw();
    width = innerWidth;
  });
}

"use strict";
{
  const element = document.getElementById("charts");
  const given = element.textContent;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Some colors would hardly be seen on a dark ground.
  const onDark = Object.entries(JSON.parse(element.dataset.onDark));
  const read = () => JSON.parse(dark.matches
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
    const narrow = chart.traces[0].names && place.clientWidth < NAMES;
    const named = narrow ? { showticklabels: false } : {};
    // Its cells are squares; what is higher than wide would be empty.
    const height = narrow ? Math.min(chart.height, place.clientWidth) : chart.height;
    place.style.height = height + "px";
    return {
      ...layout,
      height,
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
  charts.forEach((chart, index) => {
    const place = document.getElementById("chart-" + index);
    Plotly.newPlot(place, chart.traces, laidOut(chart, place), config);
    if (chart.traces[0].names) follow(place, chart.traces[0]);
  });
  const draw = () => charts.forEach((chart, index) => {
    const place = document.getElementById("chart-" + index);
    Plotly.react(place, chart.traces, laidOut(chart, place), config);
  });
  dark.addEventListener("change", () => {
    charts = read();
    draw();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if ((width < NAMES) !== (innerWidth < NAMES)) draw();
    width = innerWidth;
  });
}

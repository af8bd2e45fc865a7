"use strict";
{
  const given = document.getElementById("charts").textContent;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // The darkest of the colours would hardly be seen on a dark ground.
  const read = () => JSON.parse(dark.matches ? given.replaceAll("#0072B2", "#7ba4ff")
    .replaceAll("rgba(0,114,178,0.18)", "rgba(123,164,255,0.25)") : given);
  let charts = read();
  // Below this width names would leave no room for the cells of the matrix.
  const NAMES = 640;
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const theme = () => ({
    axis: { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") },
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12, color: colour("--text") },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--text") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
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
      const value = z === null || z === undefined ? "no cosine" : "cosine " + z.toFixed(4);
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

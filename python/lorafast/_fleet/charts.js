"use strict";
{
  const charts = JSON.parse(document.getElementById("charts").textContent);
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
  const laidOut = (chart) => {
    const { axis, layout } = theme();
    return {
      ...layout,
      height: chart.height,
      margin: { l: 60, r: 20, t: 30, b: 50 },
      legend: { orientation: "h", y: -0.22 },
      ...chart.layout,
      xaxis: { ...axis, ...chart.layout.xaxis },
      yaxis: { ...axis, ...chart.layout.yaxis },
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
    Plotly.newPlot(place, chart.traces, laidOut(chart), config);
    if (chart.traces[0].names) follow(place, chart.traces[0]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    charts.forEach((chart, index) => {
      Plotly.react(document.getElementById("chart-" + index), chart.traces, laidOut(chart), config);
    });
  });
}

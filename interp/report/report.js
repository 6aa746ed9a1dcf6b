"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  const weights = read("weights");
  const places = [...document.querySelectorAll("[data-figure]")];
  const darkScale = [[0, "#1c222b"], [0.25, "#1f4468"], [0.5, "#2f74aa"], [0.75, "#74aede"], [1, "#e3f1ff"]];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // plotly knows no style sheets: the colours of the page are handed over
  const themed = (layout, night) => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const ink = night ? of("--ink") : "#1c2128", grid = night ? of("--line") : "#e3e6eb";
    const page = night ? of("--page") : "#ffffff";
    const axis = (given) => ({ ...given, gridcolor: grid, zerolinecolor: grid, linecolor: grid });
    const changed = {
      ...layout, autosize: true, font: { ...layout.font, color: ink },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), dragmode: pointer && "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: ink },
      hoverlabel: { ...layout.hoverlabel, bgcolor: page, bordercolor: grid, font: { ...layout.hoverlabel.font, color: ink } },
    };
    if (night && layout.coloraxis) changed.coloraxis = { ...layout.coloraxis, colorscale: darkScale };
    return changed;
  };
  // a finger on a figure scrolls the page
  const pointer = window.matchMedia("(hover: hover)").matches;
  const config = {
    responsive: true, displaylogo: false, displayModeBar: pointer && "hover", modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  };
  const draw = (night) => places.forEach((place) => {
    const figure = figures[Number(place.dataset.figure)];
    Plotly.react(place, figure.data, structuredClone(themed(figure.layout, night)), config);
  });
  draw(dark.matches);
  dark.addEventListener("change", () => draw(dark.matches));
  window.addEventListener("beforeprint", () => draw(false));
  window.addEventListener("afterprint", () => draw(dark.matches));

  document.querySelectorAll("[data-view]").forEach((view) => {
    const rows = weights[Number(view.dataset.view)];
    const tokens = [...view.querySelectorAll("[data-i]")];
    const box = view.querySelector(".tokens");
    const readout = view.querySelector(".readout");
    const rest = readout.textContent;
    let shown = rows[0] || [];
    const show = (index) => {
      shown = rows[index];
      const largest = Math.max(...shown) || 1;
      tokens.forEach((token, i) => token.style.setProperty("--w", Math.sqrt(Math.max(shown[i], 0) / largest).toFixed(3)));
    };
    view.querySelectorAll("input").forEach((input) => input.addEventListener("change", () => show(Number(input.value))));
    box.addEventListener("pointerover", (event) => {
      const i = tokens.indexOf(event.target);
      if (i >= 0) readout.textContent = `position ${tokens[i].dataset.i}: weight ${shown[i].toFixed(4)}`;
    });
    box.addEventListener("pointerleave", () => { readout.textContent = rest; });
    const checked = view.querySelector("input:checked");
    if (checked) show(Number(checked.value));
    const mark = box.querySelector("mark");
    if (mark) box.scrollTop = mark.offsetTop - box.clientHeight / 2;
  });
})();

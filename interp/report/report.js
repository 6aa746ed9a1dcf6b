"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
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
    responsive: true, displaylogo: false, displayModeBar: pointer && "hover", modeBarButtons: [["zoom2d", "resetScale2d"]],
  };
  const figureOf = (place) => figures[Number(place.dataset.figure)];
  const drawn = new Set();
  const draw = (place, night) => {
    drawn.add(place);
    const figure = figureOf(place);
    return Plotly.react(place, figure.data, structuredClone(themed(figure.layout, night)), config);
  };
  const redraw = (night) => drawn.forEach((place) => draw(place, night));
  // what is near the window first, so that the page opens at once; the rest when there is time
  const near = new IntersectionObserver((seen) => seen.forEach((entry) => {
    if (!entry.isIntersecting) return;
    near.unobserve(entry.target);
    if (!drawn.has(entry.target)) draw(entry.target, dark.matches);
  }), { rootMargin: "400px" });
  places.forEach((place) => near.observe(place));
  const later = window.requestIdleCallback || ((work) => setTimeout(work, 50));
  const rest = () => {
    const next = places.find((place) => !drawn.has(place));
    if (!next) return;
    draw(next, dark.matches);
    later(rest);
  };
  window.addEventListener("load", () => setTimeout(() => later(rest), 500));
  dark.addEventListener("change", () => redraw(dark.matches));
  window.addEventListener("beforeprint", () => { places.forEach((place) => drawn.add(place)); redraw(false); });
  window.addEventListener("afterprint", () => redraw(dark.matches));

  // downloads
  const slug = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "data";
  const parser = new DOMParser();
  const plain = (text) => parser.parseFromString(String(text ?? "").replaceAll("<br>", "; "), "text/html").body.textContent;
  const table = async (place) => {
    const layout = figureOf(place).layout;
    if (layout.meta?.columns) return [layout.meta.columns, ...layout.meta.rows];
    if (!drawn.has(place)) await draw(place, dark.matches);
    const axes = ["xaxis", "yaxis"].map((name) => plain(layout[name]?.title?.text) || name[0]);
    const rows = [["series", ...axes, "low", "high", "about"]];
    // plotly unpacks typed arrays into its own copy of the traces
    for (const trace of place._fullData) {
      const bars = (i) => ["x", "y"].map((letter) => {
        const bar = trace[`error_${letter}`];
        return bar?.visible && bar.array ? [trace[letter][i] - (bar.arrayminus ?? bar.array)[i], trace[letter][i] + bar.array[i]] : null;
      }).find(Boolean) ?? ["", ""];
      const labels = trace.customdata ?? trace.text;
      for (let i = 0; trace.type === "scatter" && i < (trace.x?.length ?? 0); i++) {
        if (trace.x[i] === null || trace.hoverinfo === "skip") continue;
        rows.push([plain(trace.name), trace.x[i], trace.y[i], ...bars(i), plain(Array.isArray(labels) ? labels[i] : labels)]);
      }
    }
    return rows;
  };
  const picture = async (place, title) => {
    const figure = figureOf(place), width = 1000, top = 60;
    const layout = structuredClone(themed(figure.layout, false));
    Object.assign(layout, { width, autosize: false, paper_bgcolor: "#ffffff", height: figure.layout.height + top });
    layout.margin = { ...layout.margin, t: layout.margin.t + top };
    // the text of the page, which plotly takes for HTML
    layout.title = { text: title.replaceAll("&", "&amp;").replaceAll("<", "&lt;"), x: 0, xref: "paper", xanchor: "left", font: { size: 14 } };
    const made = await Plotly.toImage({ data: figure.data, layout }, { format: "svg", width, height: layout.height });
    return decodeURIComponent(made.slice(made.indexOf(",") + 1));
  };
  const button = (name, label, work) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = name;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", work);
    return made;
  };
  const tools = (...buttons) => {
    const made = document.createElement("div");
    made.className = "tools";
    made.append(...buttons);
    return made;
  };
  places.forEach((place) => {
    const title = place.closest("figure").querySelector("b").textContent;
    place.closest("figure").append(tools(
      button("CSV", `${title}: the numbers as CSV`, async () => interpSave(`${slug(title)}.csv`, "text/csv", interpCsv(await table(place)))),
      button("SVG", `${title}: the picture as SVG`, async () => interpSave(`${slug(title)}.svg`, "image/svg+xml", await picture(place, title))),
    ));
  });
  document.querySelectorAll(".scroll > table").forEach((shown) => {
    const title = shown.parentElement.getAttribute("aria-label");
    const rows = () => [...shown.rows].map((row) => [...row.cells].map((part) => part.textContent.trim()));
    shown.parentElement.after(tools(
      button("CSV", `${title}: the numbers as CSV`, () => interpSave(`${slug(title)}.csv`, "text/csv", interpCsv(rows()))),
    ));
  });

  document.querySelectorAll("[data-view]").forEach((view) => {
    const rows = JSON.parse(view.querySelector("script").textContent);
    const tokens = [...view.querySelectorAll("[data-i]")];
    const box = view.querySelector(".tokens");
    const readout = view.querySelector(".readout");
    const names = [...view.querySelectorAll("label")].map((label) => label.textContent.trim());
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
    readout.after(tools(button("CSV", "Attention on each token as CSV", () => interpSave("attention-on-the-text.csv", "text/csv", interpCsv([
      ["position", "token", ...names],
      ...tokens.map((token, i) => [Number(token.dataset.i), token.textContent, ...rows.map((row) => row[i])]),
    ])))));
    const checked = view.querySelector("input:checked");
    if (checked) show(Number(checked.value));
    const mark = box.querySelector("mark");
    if (mark) box.scrollTop = mark.offsetTop - box.clientHeight / 2;
  });

  const explorers = [...document.querySelectorAll(".explored")].map((place) => {
    const root = place.querySelector(".explorer");
    interpExplorer(root, JSON.parse(place.querySelector("script").textContent));
    return { root, section: place.closest("section") };
  });
  document.querySelectorAll("[data-head]").forEach((link) => {
    if (!explorers.length) return;
    const { root, section } = explorers[0];
    link.href = `#${section.id}`;
    link.addEventListener("click", () => root.dispatchEvent(new CustomEvent("interp:head", { detail: link.dataset.head })));
  });
})();

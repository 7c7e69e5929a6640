"use strict";
// Unpacks plotly, gives its figures the page's colours, and draws them; again when light turns to dark or a phone is turned.
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const phone = matchMedia("(max-width: 640px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const AXES = ["xaxis", "yaxis"];
  const ZOOMED = ["front", "latency", "losses"];
  const PX_AN_AXIS = 92;

  function webgl() {
    return document.createElement("canvas").getContext("webgl") !== null;
  }

  async function unpack() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(plain).text();
    document.head.append(script);
  }

  // "var(--name)" under a key of colours becomes what the style sheet says now
  function colored(value, key, style) {
    if (typeof value === "string") {
      const name = /color/i.test(key) && /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((one) => colored(one, key, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, colored(v, k, style)]));
  }

  function themed(layout, style) {
    const small = phone.matches;
    const ink = style.getPropertyValue("--ink").trim();
    const muted = style.getPropertyValue("--muted").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const axis = { gridcolor: grid, zerolinecolor: muted, zerolinewidth: 1, linecolor: grid, automargin: true, fixedrange: touch };
    const made = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, Segoe UI, Roboto, Noto Sans, sans-serif", size: small ? 11 : 12, color: ink },
      hoverlabel: { bgcolor: style.getPropertyValue("--card").trim(), bordercolor: muted, font: { color: ink }, align: "left" },
      margin: { l: small ? 40 : 64, r: small ? 8 : 24, t: 12, b: 48, ...layout.margin },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { color: muted }, ...layout.legend },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style.getPropertyValue("--faint").trim(), activecolor: muted },
      dragmode: touch ? false : "zoom",
    };
    for (const name of AXES) {
      const title = layout[name]?.title?.text ?? layout[name]?.title;
      made[name] = { ...axis, ...layout[name], title: { text: title ?? "", font: { color: muted }, standoff: 8 } };
    }
    return made;
  }

  function fitted(trace) {
    if (!phone.matches) return trace;
    const made = { ...trace };
    if (trace.mode === "markers+text") made.mode = "markers";
    if (trace.marker?.colorbar) {
      const bar = { ...trace.marker.colorbar, orientation: "h", len: 0.8, thickness: 8, y: -0.22, yanchor: "top" };
      made.marker = { ...trace.marker, colorbar: bar };
    }
    return made;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [name, figure] of Object.entries(figures)) {
      const place = document.getElementById(name);
      const { data, layout } = colored(figure, "", style);
      if (data[0].type === "parcoords" && !webgl()) {
        place.textContent = "This chart needs WebGL, which this browser does not have or has turned off.";
        place.style.minHeight = 0;
        continue;
      }
      if (data[0].type === "parcoords") place.style.minWidth = `${data[0].dimensions.length * PX_AN_AXIS}px`;
      const config = { displaylogo: false, responsive: true, displayModeBar: ZOOMED.includes(name) && !touch && !phone.matches };
      config.modeBarButtons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
      Plotly.react(place, data.map(fitted), themed(layout, style), config);
    }
  }

  try {
    await unpack();
    draw();
    for (const query of [phone, dark]) query.addEventListener("change", draw);
    document.documentElement.dataset.drawn = Object.keys(figures).length;
  } catch (error) {
    for (const place of document.querySelectorAll(".chart")) place.textContent = `This chart could not be drawn: ${error}`;
  }
})();

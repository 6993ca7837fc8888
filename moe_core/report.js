"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const PALETTE = {
    light: ["#0072b2", "#d55e00", "#007a5a", "#a64d85", "#6b5b00", "#1b1b1b", "#7a3cc2", "#8c4a2f"],
    dark: ["#56b4e9", "#f0a04b", "#35c79a", "#ee9fcb", "#f0e442", "#f2f2f2", "#b99bf2", "#d9a58c"],
  };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
  const PATTERNS = ["", "/", ".", "x", "-", "\\", "|", "+"];
  const CONFIG = { displayModeBar: false, responsive: true, staticPlot: false };
  const drawn = [], ofMoment = [], PAPER = 660;
  let printing = false;
  const dark = () => document.documentElement.dataset.theme === "dark";
  const colour = (i) => { const all = PALETTE[dark() ? "dark" : "light"]; return all[i % all.length]; };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const known = (values) => values.some((v) => v !== null && v !== undefined);

  function layout(more) {
    const axis = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
    const given = more || {};
    return Object.assign({}, given, {
      width: printing ? PAPER : undefined, autosize: !printing,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: given.showlegend || false,
      font: { color: css("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      height: given.height || 260, margin: Object.assign({ l: 8, r: 12, t: 8, b: 8 }, given.margin),
      xaxis: Object.assign({}, axis, given.xaxis), yaxis: Object.assign({}, axis, given.yaxis),
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    });
  }
  /* make: () => ({data, layout}) with today's colours, or a sentence about why there is nothing to draw */
  function chart(id, make) {
    const place = document.getElementById(id);
    if (!place) return;
    const draw = () => {
      const made = make();
      if (typeof made === "string") {
        place.className = "empty";
        place.textContent = made;
      } else {
        Plotly.react(place, made.data, layout(made.layout), CONFIG);
      }
    };
    drawn.push(draw);
    if (id.startsWith("experts-")) ofMoment.push(draw);
    draw();
  }
  const line = (i, x, y, more) => Object.assign({
    type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", x, y, name: runs[i].label,
    line: { color: colour(i), dash: DASHES[i % DASHES.length], width: 2 },
    marker: { color: colour(i), symbol: SYMBOLS[i % SYMBOLS.length], size: 5 },
    hovertemplate: "%{y:.4g}<extra>" + runs[i].label + "</extra>",
  }, more);

  /* --- curves ------------------------------------------------------------------------------ */
  let over = "steps";
  const OVER = { steps: "step", tokens: "tokens", seconds: "seconds in steps" };
  const axes = (title, more) => ({ hovermode: "x unified", xaxis: { title: { text: OVER[over] } },
    yaxis: Object.assign({ title: { text: title } }, more) });
  function curves(name, title, empty, more) {
    return () => {
      const data = runs.map((run, i) => line(i, run.x[over], run.curves[name])).filter((t) => known(t.y));
      return data.length ? { data, layout: axes(title, more) } : empty;
    };
  }
  chart("loss", () => {
    const data = [];
    runs.forEach((run, i) => {
      if (!known(run.curves.loss)) return;
      data.push(line(i, run.x[over], run.curves.loss, { mode: "lines", opacity: 0.9 }));
    });
    return data.length ? { data, layout: Object.assign(axes("loss per token (nats)"), { height: 320 }) }
      : "No step was recorded yet.";
  });
  const near = (value, data) => {
    const all = data.flatMap((t) => t.y);
    return value > 0.7 * Math.min(...all) && value < 1.4 * Math.max(...all);
  };
  chart("validation", () => {
    const data = runs.map((run, i) => line(i, run.validation[over], run.validation.loss, { mode: "lines+markers",
      marker: { color: colour(i), symbol: SYMBOLS[i % SYMBOLS.length], size: 9 } })).filter((t) => t.y.length);
    if (!data.length) return "No validation loss: the run has not ended, and train.validate_every is 0.";
    const shapes = [], annotations = [];
    runs.forEach((run, i) => {
      if (run.bigram === null || (i && run.bigram === runs[0].bigram) || !near(run.bigram, data)) return;
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: run.bigram, y1: run.bigram,
        line: { color: css("--soft"), width: 1, dash: "dot" } });
      annotations.push({ xref: "paper", x: 1, y: run.bigram, xanchor: "right", yanchor: "bottom", showarrow: false,
        text: "bigram model " + run.bigram.toFixed(3), font: { size: 11, color: css("--soft") } });
    });
    return { data, layout: Object.assign(axes("validation loss (nats)"), { height: 320, shapes, annotations }) };
  });
  chart("imbalance", curves("rank_imbalance", "busiest rank / mean", "No load was recorded."));
  chart("local", curves("local_share", "share of rows", "No load was recorded.", { tickformat: ".0%", range: [0, 1.02] }));
  chart("dead", curves("dead_experts", "experts", "No load was recorded.", { rangemode: "tozero" }));
  chart("dropped", curves("drop_rate", "share of choices", "No load was recorded.", { tickformat: ".1%", rangemode: "tozero" }));
  chart("norm", curves("grad_norm", "norm", "No gradient norm was recorded.", { type: "log" }));
  chart("memory", () => {
    const data = runs.map((run, i) => line(i, run.x[over], run.memory.map((v) => v === null ? null : v / 2 ** 20)))
      .filter((t) => known(t.y));
    return data.length ? { data, layout: axes("MiB a rank", { rangemode: "tozero" }) } : "No memory was recorded.";
  });

  /* --- bars --------------------------------------------------------------------------------- */
  function bars(key, unit, title, empty) {
    return () => {
      const names = [...new Set(runs.flatMap((run) => Object.keys(run[key])))];
      if (!names.length) return empty;
      const tone = dark() ? ["#8fb8de", "#e2b07a", "#7ccbb0", "#d7a9c8", "#c9c17a", "#b9bec9", "#b5a4e0", "#c7a797"]
        : ["#4a7fb0", "#c9803d", "#3f9477", "#a96a93", "#8a8030", "#6b7280", "#7f62b8", "#93664f"];
      const data = names.map((name, n) => ({
        type: "bar", orientation: "h", name, y: runs.map((run) => run.label), x: runs.map((run) => (run[key][name] || 0) * unit),
        marker: { color: tone[n % tone.length], line: { color: css("--card"), width: 1.5 },
          pattern: { shape: PATTERNS[n % PATTERNS.length], bgcolor: tone[n % tone.length], fgcolor: css("--card"), size: 8,
            solidity: 0.22 } },
        hovertemplate: name + " %{x:.4g}<extra>%{y}</extra>",
      }));
      return { data, layout: { barmode: "stack", showlegend: true, height: 130 + 44 * runs.length,
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" }, margin: { t: 40 },
        xaxis: { title: { text: title } }, yaxis: { autorange: "reversed", type: "category" } } };
    };
  }
  chart("phases", bars("phases", 1000, "ms a step, rank 0", "No times were recorded."));
  chart("bytes", bars("bytes", 1e-6, "MB a step, all ranks", "No row left its rank: nothing was sent."));

  /* --- maps --------------------------------------------------------------------------------- */
  const most = (values) => Math.max(1.5, ...values);
  const everyMost = most(runs.flatMap((run) => (run.experts.most || []).flat()));
  const rankMost = Math.max(1.2, ...runs.flatMap((run) => (run.rank_load.load || []).flat()));
  const scale = () => dark() ? "Cividis" : [[0, "#fdf6d8"], [0.25, "#d9c77a"], [0.5, "#8a8678"], [0.75, "#41507a"], [1, "#00204d"]];
  const bar = (title) => ({ title: { text: title, side: "right" }, thickness: 10, outlinewidth: 0, len: 1 });
  const numbered = (n) => Array.from({ length: n }, (_, i) => String(i));
  function map(z, x, y, top, titles, more) {
    return { type: "heatmap", z, x, y, zmin: 0, zmax: top, colorscale: scale(), xgap: z[0].length <= 64 ? 1 : 0,
      ygap: z.length <= 64 ? 1 : 0, colorbar: bar("over mean"),
      hovertemplate: titles[1] + " %{y}, " + titles[0] + " %{x}: %{z:.2f} of the mean<extra></extra>", ...more };
  }
  const mapLayout = (rows, titles) => ({ height: Math.min(520, 110 + Math.max(60, 22 * rows)),
    xaxis: { title: { text: titles[0] }, type: "category", showgrid: false, nticks: 12 },
    yaxis: { title: { text: titles[1] }, type: "category", autorange: "reversed", showgrid: false, nticks: 16 } });
  let moment = 1;
  const at = (run) => Math.round(moment * (run.experts.periods.length - 1));
  runs.forEach((run, i) => {
    chart("experts-" + i, () => {
      if (!run.experts.load) return "This run recorded no expert load.";
      const z = run.experts.load[at(run)], crosses = z[0].length <= 64;
      const text = z.map((row) => row.map((v) => (v === 0 ? "×" : "")));
      document.getElementById("period-" + i).textContent = "steps " + run.experts.periods[at(run)];
      return { data: [map(z, numbered(z[0].length), numbered(z.length), everyMost, ["expert", "layer"],
        crosses ? { text, texttemplate: "%{text}", textfont: { size: 14, color: dark() ? "#ffffff" : "#000000" } } : {})],
        layout: mapLayout(z.length, ["expert", "MoE layer"]) };
    });
    chart("layers-" + i, () => {
      if (!run.experts.most) return "This run recorded no expert load.";
      const z = run.experts.most;
      return { data: [map(z, run.experts.periods, numbered(z.length), everyMost, ["steps", "layer"])],
        layout: mapLayout(z.length, ["steps", "MoE layer"]) };
    });
    chart("ranks-" + i, () => {
      if (!run.rank_load.load) return "This run recorded no load of ranks.";
      const z = run.rank_load.load;
      if (z.length === 1) return "One rank computed everything.";
      return { data: [map(z, run.rank_load.periods, numbered(z.length), rankMost, ["steps", "rank"])],
        layout: mapLayout(z.length, ["steps", "rank"]) };
    });
  });

  /* --- tools -------------------------------------------------------------------------------- */
  const redraw = () => { drawn.forEach((draw) => draw()); keys(); };
  function keys() {
    document.querySelectorAll("[data-run]").forEach((place) => {
      const i = Number(place.dataset.run);
      const dash = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "12 4", longdashdot: "12 3 2 3" };
      place.innerHTML = '<svg width="44" height="12" aria-hidden="true"><line x1="1" y1="6" x2="43" y2="6" stroke-width="2.5" ' +
        'stroke="' + colour(i) + '" stroke-dasharray="' + dash[DASHES[i % DASHES.length]] + '"/></svg>';
    });
  }
  document.getElementById("over").addEventListener("change", (event) => { over = event.target.value; redraw(); });
  const slider = document.getElementById("moment");
  if (slider) slider.addEventListener("input", () => { moment = slider.value / 100; ofMoment.forEach((draw) => draw()); });
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function theme(name) { document.documentElement.dataset.theme = name; redraw(); }
  const wanted = () => chosen || (prefers.matches ? "dark" : "light");
  prefers.addEventListener("change", () => theme(wanted()));
  document.getElementById("theme").addEventListener("click", () => { chosen = dark() ? "light" : "dark"; theme(chosen); });
  window.addEventListener("beforeprint", () => { printing = true; theme("light"); });
  window.addEventListener("afterprint", () => { printing = false; theme(wanted()); });
  keys();
  document.documentElement.dataset.drawn = String(document.querySelectorAll(".main-svg").length);
})();

// The live job page: one stream, a chart, four sparklines, a log. The page is whole without it.
"use strict";

(() => {
  const page = document.getElementById("job");
  if (!page) return;
  const data = JSON.parse(document.getElementById("job-data").textContent);
  let seen = data.seq; // numbers up to here are on the page; a repeated one is dropped
  let ended = data.ended;

  // ---- chart ----------------------------------------------------------------------------------------------------
  const series = data.chart;
  const holder = document.getElementById("loss-chart");
  const color = (name) => getComputedStyle(page).getPropertyValue(name).trim();
  let axis = "step";
  let plot = null;
  const position = new Map(series.step.map((step, i) => [step, i]));
  const started = () => series.time.find((t) => t) || 0;

  function smooth(values) {
    // The mean of a window as wide as a fifteenth of the points, narrower towards both ends so that it never lags.
    const half = Math.floor(values.length / 30);
    const sums = [0];
    for (const v of values) sums.push(sums.at(-1) + (v ?? 0));
    return values.map((v, i) => {
      const reach = Math.min(half, i, values.length - 1 - i);
      return v === null ? null : (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1);
    });
  }

  function xOf(i) {
    if (axis === "step") return series.step[i];
    if (axis === "tokens") return series.tokens[i];
    return series.time[i] - started();
  }

  function xOfEval(evaluation) {
    if (axis === "step") return evaluation.step;
    if (axis === "time") return Math.max(0, evaluation.time - started());
    const i = position.get(evaluation.step);
    if (i !== undefined) return series.tokens[i];
    const later = series.step.findIndex((s) => s >= evaluation.step);
    return evaluation.step === 0 ? 0 : later < 0 ? series.tokens.at(-1) : series.tokens[later];
  }

  function columns() {
    const order = series.step.map((_, i) => i).sort((a, b) => series.step[a] - series.step[b]);
    const raw = order.map((i) => series.loss[i]);
    const training = [order.map(xOf), raw, smooth(raw)];
    const held = series.evals.filter((e) => e.loss !== null).map((e) => [xOfEval(e), e.loss]).sort((a, b) => a[0] - b[0]);
    return uPlot.join([[training[0], training[1], training[2]], [held.map((e) => e[0]), held.map((e) => e[1])]]);
  }

  const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  function axisText(value) {
    if (axis === "step") return number.format(value);
    if (axis === "tokens") return short.format(value);
    return value < 120 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
  }

  function tint(name, alpha) {
    return `color-mix(in oklab, ${color(name)} ${alpha}%, transparent)`;
  }

  function build() {
    if (!holder || typeof uPlot === "undefined" || !series.step.length) return;
    const ink = tint("--color-base-content", 65);
    const line = color("--color-base-300");
    const font = "11px Inter, system-ui, sans-serif";
    const gaps = () => []; // joined columns leave holes where the other series has points; lines cross them
    const options = {
      width: holder.clientWidth,
      height: holder.clientHeight,
      legend: { show: false },
      cursor: { y: false, points: { size: 7 } },
      scales: {
        x: { time: false, range: (_, low, high) => [Math.min(0, low), axis === "step" && series.total && !ended ? Math.max(series.total, high) : high || 1] },
        y: { range: (_, low, high) => (low === null ? [0, 1] : [Math.max(0, low - (high - low) * 0.08 - 0.02), high + (high - low) * 0.05 + 0.02]) },
      },
      axes: [
        { stroke: ink, font, grid: { show: false }, ticks: { show: false }, size: 26, gap: 6, values: (_, ticks) => ticks.map(axisText) },
        { stroke: ink, font, grid: { stroke: line, width: 1 }, ticks: { show: false }, size: 40, gap: 6, values: (_, ticks) => ticks.map((v) => v.toFixed(ticks.length > 1 && ticks[1] - ticks[0] < 0.1 ? 2 : 1)) },
      ],
      series: [
        {},
        { stroke: tint("--color-primary", 28), width: 1.2, points: { show: false }, gaps },
        { stroke: color("--color-primary"), width: 2.2, points: { show: false }, gaps },
        { stroke: color("--color-secondary"), width: 1.8, dash: [5, 4], points: { show: true, size: 7, width: 2, fill: color("--color-base-100") }, gaps },
      ],
      hooks: {
        setCursor: [readout],
        draw: [(u) => {
          // What is alive glows: a dot at the end of the curve while the job runs.
          const last = u.data[2].reduce((found, v, i) => (v === null || v === undefined ? found : i), -1);
          if (ended || last < 0) return;
          const x = u.valToPos(u.data[0][last], "x", true), y = u.valToPos(u.data[2][last], "y", true);
          const unit = window.devicePixelRatio || 1;
          for (const [radius, fill] of [[9, tint("--color-primary", 20)], [4.5, color("--color-primary")]]) {
            u.ctx.beginPath();
            u.ctx.arc(x, y, radius * unit, 0, 2 * Math.PI);
            u.ctx.fillStyle = fill;
            u.ctx.fill();
          }
        }],
      },
    };
    if (plot) plot.destroy();
    holder.replaceChildren();
    plot = new uPlot(options, columns(), holder);
  }

  const hint = document.getElementById("chart-readout");
  let hintAtRest = hint ? hint.textContent : "";
  function summarise() {
    // As jobs/events/history.py:summary, for the numbers that came since.
    const order = [...position.keys()].sort((a, b) => a - b);
    const first = order[0], last = order.at(-1);
    const at = (step) => series.loss[position.get(step)]?.toFixed(3);
    const held = [...series.evals].sort((a, b) => a.step - b.step);
    hintAtRest = `Training loss ${at(first)} at step ${first}, ${at(last)} at step ${last}.`;
    if (held.length) hintAtRest += ` Held-out loss ${held.at(-1).loss?.toFixed(3)}${held[0].step === 0 ? `, ${held[0].loss?.toFixed(3)} before training` : ""}.`;
    if (hint && (plot?.cursor.idx ?? null) === null) hint.textContent = hintAtRest;
    holder?.setAttribute("aria-label", hintAtRest);
  }
  function readout(u) {
    if (!hint) return;
    const i = u.cursor.idx;
    if (i === null || i === undefined) { hint.textContent = hintAtRest; return; }
    const parts = [{ step: "Step ", tokens: "Tokens ", time: "" }[axis] + axisText(u.data[0][i])];
    if (u.data[1][i] != null) parts.push(`training ${u.data[1][i].toFixed(3)}`);
    if (u.data[3][i] != null) parts.push(`held-out ${u.data[3][i].toFixed(3)}`);
    hint.textContent = parts.join(" · ");
  }

  let drawing = 0;
  function redraw() {
    if (drawing) return; // one drawing a frame, however many events came
    drawing = requestAnimationFrame(() => {
      drawing = 0;
      if (plot) plot.setData(columns());
      else build();
      sparks();
      if (series.step.length) summarise();
    });
  }

  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      axis = button.dataset.axis;
      for (const other of document.querySelectorAll("[data-axis]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      redraw();
    });
  }
  if (holder) new ResizeObserver(() => plot && plot.setSize({ width: holder.clientWidth, height: holder.clientHeight })).observe(holder);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);

  // ---- sparklines: the same path as jobs/templatetags/figures.py:sparkline ----------------------------------------
  const units = {
    lr: (v) => (v === 0 || v >= 0.001 ? String(Number(v.toPrecision(4))) : v.toExponential(2).replace(/\.?0+e/, "e")),
    grad_norm: (v) => String(Number(v.toPrecision(3))),
    tokens_per_s: (v) => number.format(v),
    memory: (v) => (v >= 2 ** 30 ? `${(v / 2 ** 30).toFixed(2)} GiB` : `${Math.round(v / 2 ** 20)} MiB`),
  };
  function sparks() {
    for (const name of Object.keys(units)) {
      const box = document.getElementById(`spark-${name}`);
      const values = series[name].filter((v) => v !== null && v !== undefined).slice(-200);
      if (!box || !values.length) continue;
      box.querySelector("[data-value]").textContent = units[name](values.at(-1));
      if (values.length < 2) continue;
      const low = Math.min(...values), reach = Math.max(...values) - low || 1, step = 160 / (values.length - 1);
      const points = values.map((v, i) => `${(i * step).toFixed(1)},${(4 + 32 * (1 - (v - low) / reach)).toFixed(1)}`);
      box.querySelector("path").setAttribute("d", "M" + points.join(" L"));
    }
  }

  // ---- log --------------------------------------------------------------------------------------------------------
  const log = document.getElementById("log");
  const follow = document.getElementById("follow");
  const rowShape = document.getElementById("log-row");
  function addLine(line, step) {
    if (!log || !rowShape) return;
    document.getElementById("log-empty")?.remove();
    if (step && log.lastElementChild?.dataset.step !== undefined) log.lastElementChild.remove(); // steps are told by the newest
    const row = rowShape.content.firstElementChild.cloneNode(true);
    if (step) row.dataset.step = "";
    const [at, level, text] = row.children;
    at.textContent = line.at;
    level.textContent = line.level;
    level.className = { warn: "text-warning font-medium", error: "text-error font-medium" }[line.level] || level.className;
    text.textContent = line.text;
    log.append(row);
    while (log.children.length > 600) log.firstElementChild.remove();
    if (!follow || follow.checked) log.scrollTop = log.scrollHeight;
  }
  if (log) log.scrollTop = log.scrollHeight;
  log?.addEventListener("wheel", (event) => { if (event.deltaY < 0 && follow) follow.checked = false; }, { passive: true });
  follow?.addEventListener("change", () => { if (follow.checked) log.scrollTop = log.scrollHeight; });

  // ---- events -----------------------------------------------------------------------------------------------------
  let asideTimer = 0;
  function refreshAside() {
    if (asideTimer) return; // samples come in threes; ask once
    asideTimer = setTimeout(() => {
      asideTimer = 0;
      htmx.ajax("GET", `${location.pathname}?part=aside`, { target: "#aside", swap: "outerHTML" });
    }, 800);
  }

  function take(event) {
    if (event.seq <= seen) return;
    seen = event.seq;
    if (event.line) addLine(event.line, event.t === "metric");
    if (event.t === "metric") {
      const at = position.get(event.step);
      const i = at === undefined ? series.step.length : at;
      position.set(event.step, i);
      series.step[i] = event.step;
      for (const name of ["loss", "tokens", "time", "lr", "grad_norm", "tokens_per_s", "memory"]) series[name][i] = event[name] ?? null;
      if (at !== undefined) refreshAside(); // a step that ran again after a resume: part of the proof
      redraw();
    } else if (event.t === "eval") {
      series.evals = series.evals.filter((e) => e.step !== event.step);
      series.evals.push({ step: event.step, loss: event.loss ?? null, time: event.time });
      redraw();
    } else if (event.t === "plan") {
      series.total = event.total_steps;
      refreshAside();
    } else if (["sample", "resumed", "verdict", "failed", "done"].includes(event.t)) {
      refreshAside();
    }
  }

  function show(html) {
    // Each top element of the part replaces the one that has its id.
    const shape = document.createElement("template");
    shape.innerHTML = html;
    for (const part of [...shape.content.children]) document.getElementById(part.id)?.replaceWith(part);
  }

  let word = data.status;
  function moved(status) {
    if (status === word) return;
    word = status;
    htmx.ajax("GET", `${location.pathname}actions/`, { target: "#actions", swap: "outerHTML" });
    refreshAside();
  }

  function end() {
    ended = true;
    close();
    redraw();
    refreshAside();
  }

  // ---- the stream, and polling where streams are cut off ------------------------------------------------------------
  let source = null;
  let poller = 0;
  let failures = 0;

  function close() {
    source?.close();
    source = null;
    clearTimeout(poller);
    poller = 0;
  }

  function open() {
    if (ended || source || poller || document.hidden) return;
    if (failures > 2) { poll(); return; }
    source = new EventSource(`${location.pathname}stream?after=${seen}`);
    const heard = () => { failures = 0; };
    source.addEventListener("event", (message) => { heard(); take(JSON.parse(message.data)); });
    source.addEventListener("status", (message) => { heard(); show(message.data); });
    source.addEventListener("moved", (message) => { heard(); moved(message.data); });
    source.addEventListener("end", end);
    source.onerror = () => {
      // Our own reconnect, so that the cursor is what this page has really shown.
      failures += 1;
      source?.close();
      source = null;
      if (!ended) setTimeout(open, 500 * failures);
    };
  }

  async function poll() {
    poller = setTimeout(() => {}, 0);
    try {
      const answer = await fetch(`${location.pathname}live?after=${seen}`, { headers: { Accept: "application/json" } });
      if (answer.status === 404 || answer.status === 403) return;
      if (answer.ok) {
        const news = await answer.json();
        news.events.forEach(take);
        show(news.html);
        moved(news.status);
        if (news.ended) { end(); return; }
      }
    } catch { /* the network is away; the next round asks again */ }
    if (!ended && !document.hidden) poller = setTimeout(poll, 2000);
    else poller = 0;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  build();
  open();
})();

// The live job page: one event stream, a chart, four sparklines, and a log. The page is complete without this script.
"use strict";

(() => {
  const page = document.getElementById("job");
  if (!page) return;
  const data = JSON.parse(document.getElementById("job-data").textContent);
  let lastSeq = data.seq; // events up to this number are on the page, so they are dropped if they arrive again
  let ended = data.ended;

  // ---- chart ----------------------------------------------------------------------------------------------------
  const series = data.chart;
  const container = document.getElementById("loss-chart");
  const color = (name) => getComputedStyle(page).getPropertyValue(name).trim();
  let axis = "step";
  let plot = null;
  const position = new Map(series.step.map((step, i) => [step, i]));
  const started = () => series.time.find((t) => t) || 0;

  function smooth(values) {
    // Centered moving average over a fifteenth of the points; the window shrinks toward both ends, so it never lags.
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
    if (!container || typeof uPlot === "undefined" || !series.step.length) return;
    const ink = tint("--color-base-content", 65);
    const line = color("--color-base-300");
    const font = "11px Inter, system-ui, sans-serif";
    const gaps = () => []; // joined columns have gaps where only the other series has points; draw lines across them
    const options = {
      width: container.clientWidth,
      height: container.clientHeight,
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
          // While the job runs, a glowing dot marks the end of the curve.
          const last = u.data[2].reduce((index, v, i) => (v === null || v === undefined ? index : i), -1);
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
    container.replaceChildren();
    plot = new uPlot(options, columns(), container);
  }

  const readoutText = document.getElementById("chart-readout");
  let defaultReadout = readoutText ? readoutText.textContent : "";
  function summarize() {
    // The same text as jobs/events/history.py:summary, including the events received since.
    const order = [...position.keys()].sort((a, b) => a - b);
    const first = order[0], last = order.at(-1);
    const at = (step) => series.loss[position.get(step)]?.toFixed(3);
    const held = [...series.evals].sort((a, b) => a.step - b.step);
    const fell = series.loss[position.get(last)] < series.loss[position.get(first)];
    defaultReadout = first === last
      ? `Training loss is ${at(last)} at step ${last}, the only step so far.`
      : fell
      ? `Training loss fell from ${at(first)} at step ${first} to ${at(last)} at step ${last}.`
      : `Training loss is ${at(last)} at step ${last}; it was ${at(first)} at step ${first}.`;
    const kept = held.find((e) => e.step === series.kept);
    if (held.length) defaultReadout += ` Held-out loss is ${(kept ?? held.at(-1)).loss?.toFixed(3)}${kept ? ` at step ${kept.step}, which is kept` : ""}${held[0].step === 0 ? `; before training it was ${held[0].loss?.toFixed(3)}` : ""}.`;
    if (readoutText && (plot?.cursor.idx ?? null) === null) readoutText.textContent = defaultReadout;
    container?.setAttribute("aria-label", defaultReadout);
  }
  function readout(u) {
    if (!readoutText) return;
    const i = u.cursor.idx;
    if (i === null || i === undefined) { readoutText.textContent = defaultReadout; return; }
    const parts = [{ step: "Step ", tokens: "Tokens ", time: "" }[axis] + axisText(u.data[0][i])];
    if (u.data[1][i] != null) parts.push(`training ${u.data[1][i].toFixed(3)}`);
    if (u.data[3][i] != null) parts.push(`held-out ${u.data[3][i].toFixed(3)}`);
    readoutText.textContent = parts.join(" · ");
  }

  let drawing = 0;
  function redraw() {
    if (drawing) return; // at most one redraw per frame, no matter how many events arrived
    drawing = requestAnimationFrame(() => {
      drawing = 0;
      if (plot) plot.setData(columns());
      else build();
      updateSparklines();
      if (series.step.length) summarize();
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
  if (container) new ResizeObserver(() => plot && plot.setSize({ width: container.clientWidth, height: container.clientHeight })).observe(container);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);

  // ---- sparklines: the same path as jobs/formatting.py:sparkline ----------------------------------------
  const units = {
    lr: (v) => (v === 0 || v >= 0.001 ? String(Number(v.toPrecision(4))) : v.toExponential(2).replace(/\.?0+e/, "e")),
    grad_norm: (v) => String(Number(v.toPrecision(3))),
    tokens_per_s: (v) => number.format(v),
    memory: (v) => (v >= 2 ** 30 ? `${(v / 2 ** 30).toFixed(2)} GiB` : `${Math.round(v / 2 ** 20)} MiB`),
  };
  function updateSparklines() {
    for (const name of Object.keys(units)) {
      const box = document.getElementById(`spark-${name}`);
      const values = series[name].filter((v) => v !== null && v !== undefined).slice(-200);
      if (!box || !values.length) continue;
      box.querySelector("[data-value]").textContent = units[name](values.at(-1));
      if (values.length < 2) continue;
      const low = Math.min(...values), extent = Math.max(...values) - low || 1, step = 160 / (values.length - 1);
      const points = values.map((v, i) => `${(i * step).toFixed(1)},${(4 + 32 * (1 - (v - low) / extent)).toFixed(1)}`);
      box.querySelector("path").setAttribute("d", "M" + points.join(" L"));
    }
  }

  // ---- log --------------------------------------------------------------------------------------------------------
  const log = document.getElementById("log");
  const follow = document.getElementById("follow");
  const rowTemplate = document.getElementById("log-row");
  function addLine(line, step, time) {
    if (!log || !rowTemplate) return;
    document.getElementById("log-empty")?.remove();
    if (step && log.lastElementChild?.dataset.step !== undefined) log.lastElementChild.remove(); // only the latest of consecutive step lines is kept
    const row = rowTemplate.content.firstElementChild.cloneNode(true);
    if (step) row.dataset.step = "";
    const [at, level, text] = row.children;
    at.textContent = line.at;
    if (time) { at.dateTime = new Date(time * 1000).toISOString(); at.dataset.style = "clock"; }
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
    if (asideTimer) return; // samples arrive in groups; refresh once
    asideTimer = setTimeout(() => {
      asideTimer = 0;
      htmx.ajax("GET", `${location.pathname}?part=aside`, { target: "#aside", swap: "outerHTML" });
    }, 800);
  }

  function handle(event) {
    if (event.seq <= lastSeq) return;
    lastSeq = event.seq;
    if (event.line) addLine(event.line, event.t === "metric", event.time);
    if (event.t === "metric") {
      const at = position.get(event.step);
      const i = at === undefined ? series.step.length : at;
      position.set(event.step, i);
      series.step[i] = event.step;
      for (const name of ["loss", "tokens", "time", "lr", "grad_norm", "tokens_per_s", "memory"]) series[name][i] = event[name] ?? null;
      if (at !== undefined) refreshAside(); // a step repeated after a resume: part of the resume check
      redraw();
    } else if (event.t === "eval") {
      series.evals = series.evals.filter((e) => e.step !== event.step);
      series.evals.push({ step: event.step, loss: event.loss ?? null, time: event.time });
      redraw();
    } else if (event.t === "plan") {
      series.total = event.total_steps;
      refreshAside();
    } else if (["sample", "resumed", "verdict", "failed", "done"].includes(event.t)) {
      const last = Math.max(...series.evals.map((e) => e.step));
      if (event.t === "done" && (event.kept_step ?? last) !== last) { series.kept = event.kept_step; redraw(); }
      refreshAside();
    }
  }

  function replaceParts(html) {
    // Each top-level element replaces the element on the page with the same id.
    const template = document.createElement("template");
    template.innerHTML = html;
    for (const part of [...template.content.children]) document.getElementById(part.id)?.replaceWith(part);
  }

  let status = data.status;
  function updateStatus(newStatus) {
    if (newStatus === status) return;
    status = newStatus;
    htmx.ajax("GET", `${location.pathname}actions/`, { target: "#actions", swap: "outerHTML" });
    refreshAside();
  }

  function end() {
    ended = true;
    close();
    redraw();
    refreshAside();
  }

  // ---- the stream, and polling where streams are blocked ------------------------------------------------------------
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
    source = new EventSource(`${location.pathname}stream?after=${lastSeq}`);
    const received = () => { failures = 0; };
    source.addEventListener("event", (message) => { received(); handle(JSON.parse(message.data)); });
    source.addEventListener("status", (message) => { received(); replaceParts(message.data); });
    source.addEventListener("moved", (message) => { received(); updateStatus(message.data); });
    source.addEventListener("end", end);
    source.onerror = () => {
      // Reconnect ourselves, so that the cursor is the last event this page has shown.
      failures += 1;
      source?.close();
      source = null;
      if (!ended) setTimeout(open, 500 * failures);
    };
  }

  async function poll() {
    poller = setTimeout(() => {}, 0);
    try {
      const response = await fetch(`${location.pathname}live?after=${lastSeq}`, { headers: { Accept: "application/json" } });
      if (response.status === 404 || response.status === 403) return;
      if (response.ok) {
        const result = await response.json();
        result.events.forEach(handle);
        replaceParts(result.html);
        updateStatus(result.status);
        if (result.ended) { end(); return; }
      }
    } catch { /* offline; the next poll tries again */ }
    if (!ended && !document.hidden) poller = setTimeout(poll, 2000);
    else poller = 0;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  build();
  open();
})();

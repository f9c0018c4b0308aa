// Streams answers token by token. Without this script, the form is submitted and the page shows the whole answer.
"use strict";

(() => {
  const form = document.getElementById("playground");
  if (!form || !window.ReadableStream) return;
  const answers = document.getElementById("answers");
  const template = document.getElementById("answer-shape");
  const run = form.querySelector("[data-run]");
  const stop = form.querySelector("[data-stop]");
  let running = null;

  function model() {
    const field = form.elements.model;
    const chosen = field.tagName === "SELECT" ? field.selectedOptions[0] : field;
    return { id: field.value, base: chosen?.dataset.base || "" };
  }

  function addAnswer(name) {
    const section = template.content.firstElementChild.cloneNode(true);
    section.querySelector("h3").textContent = name;
    answers.append(section);
    return { text: section.querySelector("[data-text]"), note: section.querySelector("[data-note]") };
  }

  function showError(place, message) {
    place.note.textContent = message;
    place.note.classList.add("text-error");
  }

  async function answer(name, place, signal) {
    const data = new FormData(form);
    data.set("model", name);
    place.note.textContent = "Waiting for the model…";
    const response = await fetch(form.dataset.stream, { method: "POST", body: data, signal });
    if (!response.ok) {
      const result = await response.json().catch(() => ({}));
      showError(place, result.error || "Something went wrong. Reload the page and try again.");
      return;
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const started = performance.now();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split("\n");
      buffer = lines.pop();
      for (const line of lines) handle(JSON.parse(line), place, started);
    }
  }

  function handle(event, place, started) {
    if (event.t === "token") {
      place.text.append(event.text);
    } else if (event.t === "start") {
      place.note.textContent = "";
    } else if (event.t === "done") {
      const seconds = (performance.now() - started) / 1000;
      const tokens = event.usage?.completion_tokens ?? 0;
      const reason = event.choices?.[0]?.finish_reason === "length" ? " · reached the token limit" : "";
      place.note.textContent = `${tokens} token${tokens === 1 ? "" : "s"} in ${seconds.toFixed(1)} s${reason}`;
      for (const call of event.choices?.[0]?.tool_calls ?? []) {
        place.text.append(`${place.text.textContent && "\n"}Calls ${call.name} with ${call.arguments}`);
      }
      if (!place.text.textContent) place.text.textContent = "The model ended its answer at once.";
    } else if (event.t === "error") {
      showError(place, event.message);
    }
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    run.disabled = true;
    stop.disabled = false;
    answers.replaceChildren();
    const { id, base } = model();
    const names = form.elements.compare.checked && base && base !== id ? [id, base] : [id];
    const places = names.map((name, i) => [name, addAnswer(i ? `${name} · base model` : name)]);
    try {
      for (const [name, place] of places) await answer(name, place, running.signal); // sequentially: both run on the same machine
    } catch (error) {
      const place = places.find(([, p]) => !/ tokens? in /.test(p.note.textContent))?.[1];
      if (place && error.name === "AbortError") place.note.textContent = "Stopped.";
      else if (place) showError(place, "Connection lost. Press Generate to try again.");
    } finally {
      running = null;
      run.disabled = false;
      stop.disabled = true;
    }
  });

  form.elements.model.addEventListener("change", () => {
    // as the model was trained; base models and models from before this was recorded leave the choice as it is
    const mode = form.elements.model.selectedOptions?.[0]?.dataset.mode;
    if (mode) form.elements.mode.value = mode;
  });
  stop.addEventListener("click", () => running?.abort());
  addEventListener("pagehide", () => running?.abort());
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
})();

// Upload with a progress bar, by dropping a file or choosing one. Without this script the form does it plainly.
"use strict";

(() => {
  const form = document.getElementById("upload");
  if (!form) return;
  const input = form.querySelector("input[type=file]");
  const box = document.getElementById("upload-progress");
  const text = box.querySelector("[data-text]");
  const bar = box.querySelector("progress");
  const stop = box.querySelector("[data-cancel]");
  const row = box.querySelector("[data-bar]");
  const size = (n) => (n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} KB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);
  let request = null;

  function say(message, { bad = false } = {}) {
    text.textContent = message;
    text.classList.toggle("text-error", bad);
    text.classList.toggle("text-base-content/65", !bad);
    row.hidden = !request;
  }

  function send(file) {
    if (request || !file) return;
    const data = new FormData(form);
    data.set("file", file);
    const started = performance.now();
    request = new XMLHttpRequest(); // fetch does not tell how much has gone up
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.responseType = "json";
    request.upload.onprogress = (event) => {
      if (!event.lengthComputable) return;
      bar.value = (100 * event.loaded) / event.total;
      const left = ((performance.now() - started) / 1000 / event.loaded) * (event.total - event.loaded);
      const rest = left > 2 ? `, ${Math.ceil(left)} s left` : "";
      say(event.loaded < event.total ? `${size(event.loaded)} of ${size(event.total)}${rest}` : "Storing …");
    };
    request.onload = () => {
      const { status, response } = request;
      request = null;
      if (status === 201) { location.assign(response.url); return; }
      say(response?.error || (status === 413 ? "The file is larger than this studio takes." : "That did not work. Reload the page and try again."), { bad: true });
    };
    request.onerror = () => { request = null; say("The connection broke. Choose the file again to retry.", { bad: true }); };
    request.onabort = () => { request = null; say("Stopped. Nothing was kept."); };
    bar.value = 0;
    say(`Sending ${file.name}`);
    request.send(data);
  }

  stop.addEventListener("click", () => request?.abort());
  form.addEventListener("submit", (event) => { event.preventDefault(); send(input.files[0]); });
  input.addEventListener("change", () => send(input.files[0]));
  for (const name of ["dragenter", "dragover"]) form.addEventListener(name, (event) => { event.preventDefault(); form.dataset.over = ""; });
  for (const name of ["dragleave", "drop"]) form.addEventListener(name, () => { delete form.dataset.over; });
  form.addEventListener("drop", (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); });
})();

// Multipart upload with a progress bar, a stop button, and resuming after a lost connection. Without this script, the form
// uploads the whole file in one request.
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
  const duplicate = box.querySelector("[data-duplicate]");
  const csrf = form.querySelector("[name=csrfmiddlewaretoken]").value;
  const MAX_ATTEMPTS = 6; // per request, with waits of 1, 2, 4, … s in between
  const CONCURRENCY = 3;
  const SAMPLE_BYTES = 1 << 20;
  const FULL_HASH_BYTES = 32 << 20; // up to this size, the fingerprint is the file's SHA-256
  const size = (n) => (n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} KB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  let current = null; // the running upload

  class Refused extends Error {} // the server rejected it; the message is shown to the user
  class Stopped extends Error {}

  function showMessage(message, { isError = false } = {}) {
    text.textContent = message;
    text.classList.toggle("text-error", isError);
    text.classList.toggle("text-base-content/65", !isError);
    row.hidden = !current;
  }

  const hex = (buffer) => [...new Uint8Array(buffer)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const digest = async (blob) => hex(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer()));

  // The form's other fields, such as the name of a base model.
  const fieldsOf = (data) => Object.fromEntries([...data].filter(([name, value]) => name !== "csrfmiddlewaretoken" && typeof value === "string"));

  // A fingerprint that recognizes the same file later. For large files it uses the size and three samples, and without crypto
  // (plain HTTP) the name and date.
  async function fingerprintOf(file) {
    if (!globalThis.crypto?.subtle) return `date:${file.lastModified}`;
    if (file.size <= FULL_HASH_BYTES) return `sha256:${await digest(file)}`;
    const middle = Math.floor(file.size / 2);
    const samples = [file.slice(0, SAMPLE_BYTES), file.slice(middle, middle + SAMPLE_BYTES), file.slice(-SAMPLE_BYTES), String(file.size)];
    return `some:${await digest(new Blob(samples))}`;
  }

  // Uses XMLHttpRequest, because fetch does not report upload progress.
  function send(method, url, body, { headers = {}, progress } = {}) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      current?.requests.add(request);
      request.open(method, url);
      for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
      if (progress) request.upload.onprogress = (event) => progress(event.loaded);
      request.onloadend = () => current?.requests.delete(request);
      request.onload = () => resolve(request);
      request.onerror = () => reject(new Error("network"));
      request.onabort = () => reject(new Stopped());
      request.send(body);
    });
  }

  const isRetryable = (response) => response.status === 429 || response.status >= 500;

  async function postForm(url, fields) {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.set(name, value);
    const response = await send("POST", url, body, { headers: { "X-CSRFToken": csrf, Accept: "application/json" } });
    let result = null;
    try { result = JSON.parse(response.responseText); } catch { /* an error page */ }
    if (response.status === 422) throw new Refused(result?.error);
    if (isRetryable(response)) throw new Error("network");
    if (response.status >= 400 || !result) throw new Refused("Something went wrong. Reload the page and try again.");
    return result;
  }

  async function withRetries(action) {
    for (let n = 1; ; n++) {
      try { return await action(); } catch (error) {
        if (error instanceof Refused || error instanceof Stopped || current.stopped) throw current.stopped ? new Stopped() : error;
        if (n === MAX_ATTEMPTS) throw error;
        const seconds = 2 ** (n - 1);
        showMessage(`Connection lost. Retrying in ${seconds} s…`);
        await wait(1000 * seconds);
        if (current.stopped) throw new Stopped();
      }
    }
  }

  function updateProgress() {
    const { file, uploaded, began, before } = current;
    const sent = Math.min(file.size, [...uploaded.values()].reduce((a, b) => a + b, 0));
    bar.value = (100 * sent) / file.size;
    const left = ((performance.now() - began) / 1000 / Math.max(1, sent - before)) * (file.size - sent);
    showMessage(`${size(sent)} of ${size(file.size)}${left > 2 && sent > before ? `, ${Math.ceil(left)} s left` : ""}`);
  }

  async function sendPart(number) {
    const { file, session, uploaded } = current;
    const part = file.slice((number - 1) * session.part_bytes, number * session.part_bytes);
    const progress = (loaded) => { uploaded.set(number, Math.min(loaded, part.size)); updateProgress(); };
    if (session.links && !current.viaServer) {
      const link = (await postForm(session.links, { numbers: String(number) })).links[number];
      try {
        const response = await send("PUT", link, part, { progress });
        if (response.status >= 400) throw new Error(`bucket ${response.status}`);
        uploaded.set(number, part.size);
        return;
      } catch (error) {
        if (error instanceof Stopped) throw error;
        current.viaServer = true; // the browser can't reach the bucket: send the parts through the server
      }
    }
    const headers = { "X-CSRFToken": csrf, "Content-Type": "application/octet-stream", Accept: "application/json" };
    if (globalThis.crypto?.subtle) headers["X-Part-Sha256"] = await digest(part);
    const response = await send("PUT", `${session.url}${number}/`, part, { headers, progress });
    if (response.status === 422) throw new Refused(JSON.parse(response.responseText).error);
    if (isRetryable(response)) throw new Error("network");
    if (response.status >= 400) throw new Refused("Something went wrong. Reload the page and try again.");
    uploaded.set(number, part.size);
  }

  async function sendParts() {
    const { file, session, uploaded } = current;
    const all = Array.from({ length: Math.ceil(file.size / session.part_bytes) }, (_, i) => i + 1);
    for (const number of session.have) uploaded.set(number, Math.min(session.part_bytes, file.size - (number - 1) * session.part_bytes));
    current.before = [...uploaded.values()].reduce((a, b) => a + b, 0);
    current.began = performance.now();
    const pending = all.filter((number) => !session.have.includes(number));
    const worker = async () => {
      while (pending.length && !current.stopped) {
        const number = pending.shift();
        await withRetries(() => sendPart(number));
        updateProgress();
      }
    };
    await Promise.all(Array.from({ length: CONCURRENCY }, worker));
    if (current.stopped) throw new Stopped();
  }

  async function upload(file, again = false) {
    if (current || !file) return;
    current = { file, requests: new Set(), uploaded: new Map(), began: 0, before: 0, session: null, stopped: false, viaServer: false };
    duplicate.hidden = true;
    bar.value = 0;
    showMessage(`Checking ${file.name}…`);
    try {
      const fingerprint = await fingerprintOf(file);
      const session = await withRetries(() => postForm(form.dataset.begin, { ...fieldsOf(new FormData(form)), name: file.name, bytes: file.size, mark: fingerprint, ...(again && { again: "1" }) }));
      if (session.same) { showDuplicate(file, session.same); return; }
      current.session = session;
      if (session.have.length) showMessage("Resuming…");
      await sendParts();
      showMessage("Finishing…");
      const done = await withRetries(() => postForm(session.complete, {}));
      current = null;
      location.assign(done.url);
    } catch (error) {
      const { session, requests } = current;
      const stopped = error instanceof Stopped;
      for (const request of requests) request.abort();
      current = null;
      if (stopped && session) await send("POST", session.cancel, null, { headers: { "X-CSRFToken": csrf, Accept: "application/json" } }).catch(() => {});
      if (stopped) showMessage("Stopped. The upload was discarded.");
      else if (error instanceof Refused) showMessage(error.message, { isError: true });
      else showMessage("Connection lost. Choose the same file again to resume.", { isError: true });
      input.value = "";
    }
  }

  // If the same file was uploaded before, this tells the user and lets them decide.
  function showDuplicate(file, same) {
    current = null;
    showMessage("");
    duplicate.hidden = false;
    const link = duplicate.querySelector("a");
    link.href = same.url;
    link.textContent = same.name;
    duplicate.querySelector("[data-when]").textContent = same.when;
    duplicate.querySelector("button").onclick = () => upload(file, true);
  }

  stop.addEventListener("click", () => {
    if (!current) return;
    current.stopped = true;
    for (const request of current.requests) request.abort();
  });
  window.addEventListener("beforeunload", (event) => { if (current) event.preventDefault(); });
  form.addEventListener("submit", (event) => { event.preventDefault(); upload(input.files[0]); });
  // A form with other fields is sent when they are complete.
  if (!("onSubmit" in form.dataset)) input.addEventListener("change", () => upload(input.files[0]));
  for (const name of ["dragenter", "dragover"]) form.addEventListener(name, (event) => { event.preventDefault(); form.dataset.over = ""; });
  for (const name of ["dragleave", "drop"]) form.addEventListener(name, () => { delete form.dataset.over; });
  form.addEventListener("drop", (event) => { event.preventDefault(); upload(event.dataTransfer.files[0]); });
})();

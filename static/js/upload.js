// Upload in parts: with a progress bar, a stop, and a way to go on after a broken connection. Without this script the form
// sends the file plainly.
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
  const twin = box.querySelector("[data-twin]");
  const csrf = form.querySelector("[name=csrfmiddlewaretoken]").value;
  const TRIES = 6; // of a part; waits 1, 2, 4 … s between them
  const AT_ONCE = 3;
  const SAMPLE = 1 << 20;
  const WHOLE = 32 << 20; // up to here the mark is the file's own sha256
  const size = (n) => (n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} KB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  let current = null; // the upload under way

  class Refused extends Error {} // the studio said no; the message is for a person
  class Stopped extends Error {}

  function say(message, { bad = false } = {}) {
    text.textContent = message;
    text.classList.toggle("text-error", bad);
    text.classList.toggle("text-base-content/65", !bad);
    row.hidden = !current;
  }

  const hex = (buffer) => [...new Uint8Array(buffer)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const digest = async (blob) => hex(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer()));

  // Tells the same file again. Large ones by their size and three samples; where there is no crypto (plain http), by name and date.
  async function markOf(file) {
    if (!globalThis.crypto?.subtle) return `date:${file.lastModified}`;
    if (file.size <= WHOLE) return `sha256:${await digest(file)}`;
    const middle = Math.floor(file.size / 2);
    const samples = [file.slice(0, SAMPLE), file.slice(middle, middle + SAMPLE), file.slice(-SAMPLE), String(file.size)];
    return `some:${await digest(new Blob(samples))}`;
  }

  // XMLHttpRequest: fetch does not tell how much has gone up.
  function send(method, url, body, { headers = {}, progress } = {}) {
    return new Promise((done, failed) => {
      const request = new XMLHttpRequest();
      current?.requests.add(request);
      request.open(method, url);
      for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
      if (progress) request.upload.onprogress = (event) => progress(event.loaded);
      request.onloadend = () => current?.requests.delete(request);
      request.onload = () => done(request);
      request.onerror = () => failed(new Error("network"));
      request.onabort = () => failed(new Stopped());
      request.send(body);
    });
  }

  const busy = (answer) => answer.status === 429 || answer.status >= 500; // worth another try

  async function ask(url, fields) {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.set(name, value);
    const answer = await send("POST", url, body, { headers: { "X-CSRFToken": csrf, Accept: "application/json" } });
    let told = null;
    try { told = JSON.parse(answer.responseText); } catch { /* an error page */ }
    if (answer.status === 422) throw new Refused(told?.error);
    if (busy(answer)) throw new Error("network");
    if (answer.status >= 400 || !told) throw new Refused("That did not work. Reload the page and try again.");
    return told;
  }

  async function patiently(what) {
    for (let n = 1; ; n++) {
      try { return await what(); } catch (error) {
        if (error instanceof Refused || error instanceof Stopped || current.stopped) throw current.stopped ? new Stopped() : error;
        if (n === TRIES) throw error;
        const seconds = 2 ** (n - 1);
        say(`The connection broke. Trying again in ${seconds} s …`);
        await wait(1000 * seconds);
        if (current.stopped) throw new Stopped();
      }
    }
  }

  function show() {
    const { file, came, began, before } = current;
    const sent = Math.min(file.size, [...came.values()].reduce((a, b) => a + b, 0));
    bar.value = (100 * sent) / file.size;
    const left = ((performance.now() - began) / 1000 / Math.max(1, sent - before)) * (file.size - sent);
    say(`${size(sent)} of ${size(file.size)}${left > 2 && sent > before ? `, ${Math.ceil(left)} s left` : ""}`);
  }

  async function sendPart(number) {
    const { file, told, came } = current;
    const part = file.slice((number - 1) * told.part_bytes, number * told.part_bytes);
    const progress = (loaded) => { came.set(number, Math.min(loaded, part.size)); show(); };
    if (told.links && !current.through) {
      const link = (await ask(told.links, { numbers: String(number) })).links[number];
      try {
        const answer = await send("PUT", link, part, { progress });
        if (answer.status >= 400) throw new Error(`bucket ${answer.status}`);
        came.set(number, part.size);
        return;
      } catch (error) {
        if (error instanceof Stopped) throw error;
        current.through = true; // the bucket can't be reached from here: the parts go through the studio
      }
    }
    const headers = { "X-CSRFToken": csrf, "Content-Type": "application/octet-stream", Accept: "application/json" };
    if (globalThis.crypto?.subtle) headers["X-Part-Sha256"] = await digest(part);
    const answer = await send("PUT", `${told.url}${number}/`, part, { headers, progress });
    if (answer.status === 422) throw new Refused(JSON.parse(answer.responseText).error);
    if (busy(answer)) throw new Error("network");
    if (answer.status >= 400) throw new Refused("That did not work. Reload the page and try again.");
    came.set(number, part.size);
  }

  async function sendParts() {
    const { file, told, came } = current;
    const all = Array.from({ length: Math.ceil(file.size / told.part_bytes) }, (_, i) => i + 1);
    for (const number of told.have) came.set(number, Math.min(told.part_bytes, file.size - (number - 1) * told.part_bytes));
    current.before = [...came.values()].reduce((a, b) => a + b, 0);
    current.began = performance.now();
    const waiting = all.filter((number) => !told.have.includes(number));
    const lane = async () => {
      while (waiting.length && !current.stopped) {
        const number = waiting.shift();
        await patiently(() => sendPart(number));
        show();
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, lane));
    if (current.stopped) throw new Stopped();
  }

  async function upload(file, again = false) {
    if (current || !file) return;
    current = { file, requests: new Set(), came: new Map(), began: 0, before: 0, told: null, stopped: false, through: false };
    twin.hidden = true;
    bar.value = 0;
    say(`Looking at ${file.name} …`);
    try {
      const mark = await markOf(file);
      const told = await patiently(() => ask(form.dataset.begin, { name: file.name, bytes: file.size, mark, ...(again && { again: "1" }) }));
      if (told.same) { known(file, told.same); return; }
      current.told = told;
      if (told.have.length) say("Going on where it stopped …");
      await sendParts();
      say("Putting it together …");
      const done = await patiently(() => ask(told.complete, {}));
      current = null;
      location.assign(done.url);
    } catch (error) {
      const { told, requests } = current;
      const stopped = error instanceof Stopped;
      for (const request of requests) request.abort();
      current = null;
      if (stopped && told) await send("POST", told.cancel, null, { headers: { "X-CSRFToken": csrf, Accept: "application/json" } }).catch(() => {});
      if (stopped) say("Stopped. Nothing was kept.");
      else if (error instanceof Refused) say(error.message, { bad: true });
      else say("The connection is broken. Choose the same file again: it goes on where it stopped.", { bad: true });
      input.value = "";
    }
  }

  // The same bytes are here already: said, not decided.
  function known(file, same) {
    current = null;
    say("");
    twin.hidden = false;
    const link = twin.querySelector("a");
    link.href = same.url;
    link.textContent = same.name;
    twin.querySelector("[data-when]").textContent = same.when;
    twin.querySelector("button").onclick = () => upload(file, true);
  }

  stop.addEventListener("click", () => {
    if (!current) return;
    current.stopped = true;
    for (const request of current.requests) request.abort();
  });
  window.addEventListener("beforeunload", (event) => { if (current) event.preventDefault(); });
  form.addEventListener("submit", (event) => { event.preventDefault(); upload(input.files[0]); });
  input.addEventListener("change", () => upload(input.files[0]));
  for (const name of ["dragenter", "dragover"]) form.addEventListener(name, (event) => { event.preventDefault(); form.dataset.over = ""; });
  for (const name of ["dragleave", "drop"]) form.addEventListener(name, () => { delete form.dataset.over; });
  form.addEventListener("drop", (event) => { event.preventDefault(); upload(event.dataTransfer.files[0]); });
})();

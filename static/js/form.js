// The new-job form. Without this script, every button submits the form and the page is rendered again with its values.
"use strict";

(() => {
  const form = document.getElementById("new-job");
  if (!form) return;

  // The placeholder shows the automatic value; the hint that htmx swaps in carries the latest one.
  document.addEventListener("htmx:oobAfterSwap", (event) => {
    const hint = event.detail.target;
    if (!hint?.id?.startsWith("hint-")) return;
    const input = document.getElementById(`id_${hint.id.slice(5)}`);
    if (input && "placeholder" in input && input.type !== "select-one") input.placeholder = hint.dataset.automatic;
  });

  // "lock" writes the automatic value into the field.
  form.addEventListener("click", (event) => {
    const button = event.target.closest("[data-lock]");
    const input = button && document.getElementById(button.dataset.lock);
    if (!input?.placeholder) return;
    event.preventDefault();
    input.value = input.placeholder;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  // "reset to auto" clears the field in place.
  form.addEventListener("click", (event) => {
    const button = event.target.closest("[data-clear]");
    if (!button) return;
    event.preventDefault();
    const input = document.getElementById(button.dataset.clear);
    if (input.tagName === "SELECT") input.value = button.dataset.fallback ?? input.options[0].value;
    else input.value = "";
    input.focus();
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
})();

// Small enhancements for every page; all pages work without them.

// An open menu closes on Escape and on a click elsewhere.
const openMenus = () => document.querySelectorAll("details[data-menu][open]");
document.addEventListener("click", (event) => {
  for (const menu of openMenus()) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of openMenus()) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});

// Elements that need scripts are shown only if scripts run.
for (const element of document.querySelectorAll("[data-needs-js]")) element.hidden = false;

// Show and hide a password while it is typed.
for (const button of document.querySelectorAll("[data-reveal]")) {
  const input = document.getElementById(button.dataset.reveal);
  button.hidden = false;
  button.addEventListener("click", () => {
    const shown = input.type === "text";
    input.type = shown ? "password" : "text";
    button.textContent = shown ? "Show" : "Hide";
    button.setAttribute("aria-pressed", String(!shown));
    input.focus();
  });
}

// Copy an element's text.
for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    await navigator.clipboard.writeText((source.value ?? source.textContent).trim());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
}

// Times are shown in the reader's time zone; without scripts they are in the server's, which they name.
const clockTime = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
function localize(element) {
  const at = new Date(element.dateTime);
  if (Number.isNaN(at.getTime()) || element.dataset.local === element.dateTime) return;
  element.dataset.local = element.dateTime;
  const now = new Date();
  if (element.dataset.style === "clock") {
    element.textContent = at.toLocaleTimeString("en-US", { ...clockTime, second: "2-digit" });
    return;
  }
  const day = { month: "short", day: "numeric" };
  element.textContent = at.toDateString() === now.toDateString() ? at.toLocaleTimeString("en-US", clockTime)
    : at.getFullYear() === now.getFullYear() ? at.toLocaleString("en-US", { ...day, ...clockTime })
    : at.toLocaleDateString("en-US", { ...day, year: "numeric" });
  element.title = at.toLocaleString("en-US", { dateStyle: "medium", timeStyle: "long" });
}
const localizeAll = () => document.querySelectorAll("time[data-style]").forEach(localize);
localizeAll();
// Also in parts of a page that arrive later.
new MutationObserver(localizeAll).observe(document.body, { childList: true, subtree: true });

// Measures what a person sees, and writes it where `--dump-dom` shows it. Put into a copy of the page by page.rs.
function piece(element) {
  const box = element.getBoundingClientRect();
  const row = element.closest("tr");
  const step = row ? row.querySelector(".step") : null;
  return {
    text: element.innerText.trim(),
    step: step ? step.innerText.trim() : "",
    x: box.x,
    y: box.y,
    width: box.width,
    height: box.height,
  };
}
function all(selector) {
  return Array.from(document.querySelectorAll(selector), piece);
}
const root = document.documentElement;
document.getElementById("probe").textContent = JSON.stringify({
  lanes: all("#trace th.cpu"),
  headings: all("#trace th"),
  cards: all("#trace .card"),
  dirty: all("#trace td.dirty"),
  lag: all("#trace td.lag"),
  found: piece(document.getElementById("found")),
  violation: piece(document.querySelector("#violation td:last-child")),
  foreign: document.scripts.length - 1 + performance.getEntriesByType("resource").length,
  hidden: Math.max(
    root.scrollWidth - root.clientWidth,
    ...Array.from(document.querySelectorAll(".scroll"), (box) => box.scrollWidth - box.clientWidth),
  ),
});

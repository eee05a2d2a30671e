"use strict";
// the value under the pointer, where a tooltip would be out of a finger's reach
for (const chart of document.querySelectorAll(".chart")) {
  const output = chart.querySelector("output"), usual = output.textContent;
  chart.addEventListener("pointerover", (event) => {
    const title = event.target.querySelector(":scope > title");
    if (title) output.textContent = title.textContent;
  });
  chart.addEventListener("pointerleave", () => { output.textContent = usual; });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const input of document.querySelectorAll(".zoom input:checked")) input.checked = false;
});

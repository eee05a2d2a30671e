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
// one picture at a time, chosen by a slider; without this script they stand side by side
for (const timeline of document.querySelectorAll(".timeline")) {
  const figures = [...timeline.children];
  if (figures.length < 2) continue;
  const row = document.createElement("label"), slider = document.createElement("input"), text = document.createElement("span");
  slider.type = "range";
  slider.max = figures.length - 1;
  slider.value = slider.max;
  slider.setAttribute("aria-label", timeline.getAttribute("aria-label") + ", by step");
  const show = () => {
    figures.forEach((figure, at) => figure.classList.toggle("shown", at === Number(slider.value)));
    text.textContent = figures[slider.value].querySelector("figcaption").textContent;
    slider.setAttribute("aria-valuetext", text.textContent);
  };
  slider.addEventListener("input", show);
  row.className = "slide";
  row.append(slider, text);
  timeline.before(row);
  timeline.parentElement.classList.add("slides");
  show();
}
// two images of an example on top of each other, with a border that is dragged
for (const tiles of document.querySelectorAll(".example .tiles")) {
  const images = [...tiles.querySelectorAll(".zoom img")].slice(0, 2);
  if (images.length < 2 || tiles.querySelector(".missing")) continue;
  const box = document.createElement("div"), slider = document.createElement("input"), bar = document.createElement("div");
  box.className = "compare";
  bar.className = "bar";
  slider.type = "range";
  slider.setAttribute("aria-label", images.map((image) => image.alt).join(" against "));
  slider.addEventListener("input", () => box.style.setProperty("--at", slider.value + "%"));
  for (const image of images) box.append(image.cloneNode());
  for (const [at, name] of ["first", "second"].entries()) {
    const label = document.createElement("span");
    label.className = name;
    label.textContent = images[at].closest("figure").querySelector("figcaption b").textContent;
    box.append(label);
  }
  box.append(bar, slider);
  tiles.before(box);
}
// a page of a run that goes on is read again; the browser keeps the place
const again = Number(document.body.dataset.again);
if (again) setTimeout(() => location.reload(), 1000 * again);

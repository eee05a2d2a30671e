"""The pages in a real browser, from disk, on a desktop's and on a phone's width."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from esengine.report import write_evaluation_page, write_training_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REQUIRED = os.environ.get("ESENGINE_TEST_BROWSER") == "required"
pytestmark = pytest.mark.skipif(BROWSER is None and not REQUIRED, reason="there is no Chromium on this machine")

WIDTHS = (375, 1280)
LOOK = """
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach((details) => { details.open = true; });
  const images = [...page.images];
  const drawn = [...page.querySelectorAll(".chart svg")];
  const found = {
    width: page.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter((image) => !image.naturalWidth || !image.clientWidth).length,
    charts: drawn.length,
    flat: drawn.filter((svg) => ![...svg.querySelectorAll(".line, .area, .outline")].some(
      (path) => path.getBBox().width > 1)).length,
    tick: Math.min(99, ...[...page.querySelectorAll(".tick")].map((text) =>
      parseFloat(view.getComputedStyle(text).fontSize) * text.getScreenCTM().a)),
    injected: Boolean(view.injected) || page.querySelectorAll("script").length !== 1,
    prompts: [...page.querySelectorAll(".prompt")].map((prompt) => prompt.textContent),
    dark: view.getComputedStyle(page.body).backgroundColor,
  };
  const zoom = page.querySelector(".zoom");
  zoom.click();
  found.enlarged = view.getComputedStyle(zoom).position;
  page.dispatchEvent(new view.KeyboardEvent("keydown", { key: "Escape" }));
  found.restored = view.getComputedStyle(zoom).position;
  const chart = page.querySelector(".chart");
  if (chart) {
    const hit = chart.querySelector(".hit");
    hit.dispatchEvent(new view.PointerEvent("pointerover", { bubbles: true }));
    found.pointed = chart.querySelector("output").textContent === hit.textContent && hit.textContent !== "";
    chart.dispatchEvent(new view.PointerEvent("pointerleave"));
  }
  return found;
}
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) found[frame.id] = look(frame);
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def looked(evaluation_folder, run_folder, gallery_folder, tmp_path_factory):
    """What a browser says of every page at every width, and its console."""
    folder = tmp_path_factory.mktemp("browser")
    pages = {
        "evaluation": write_evaluation_page(evaluation_folder(folder / "evaluation")),
        "training": write_training_page(run_folder(folder / "run")),
        "gallery": gallery_folder / "gallery.html",
    }
    frames = "".join(
        f'<iframe id="{name}@{width}" src="{page.as_uri()}" style="border:0;width:{width}px;height:900px"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<meta charset=utf-8>{frames}<pre></pre><script>{LOOK}</script>")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    flags += [
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=20000",
    ]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)[1])), console


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", ["evaluation", "training", "gallery"])
def test_a_page_opens_and_shows_everything(looked, page, width):
    found = looked[0][f"{page}@{width}"]
    assert found["width"] == width  # nothing sticks out to the side
    assert found["images"] >= 8
    assert found["broken"] == 0
    assert (found["charts"] > 3) == (page != "gallery")
    assert found["flat"] == 0
    assert found["tick"] > 8  # the smallest label of a chart, in CSS pixels
    assert found["enlarged"] == "fixed"
    assert found["restored"] == "relative"
    assert found.get("pointed", page == "gallery")
    assert not found["injected"]


def test_the_console_is_quiet(looked):
    assert looked[1] == []


def test_prompts_read_as_they_were_written(looked, hostile_prompts):
    shown = set(looked[0]["evaluation@375"]["prompts"])
    assert shown
    written = {prompt.replace("\ud800", "?") for prompt in hostile_prompts}
    assert {prompt for prompt in shown if not re.fullmatch(r"prompt \d+", prompt)} <= written
    assert any("<script>" in prompt for prompt in shown)

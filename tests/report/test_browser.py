"""The pages in a real browser, from disk, on a desktop's and on a phone's width."""

import html
import json
import re
import subprocess

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import PROGRAM, chromium, needs_browser

from esengine.report import write_evaluation_page, write_training_page

pytestmark = needs_browser

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
    broken: images.filter((image) => !image.naturalWidth
      || (!image.clientWidth && !image.closest(".slides figure:not(.shown)"))).length,
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
        [PROGRAM, *flags, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True
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


# ---- used as a person uses them


@pytest.fixture(scope="module")
def written(evaluation_folder, run_folder, gallery_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {
        "evaluation": write_evaluation_page(evaluation_folder(folder / "evaluation")),
        "training": write_training_page(run_folder(folder / "run")),
        "long": write_training_page(run_folder(folder / "long", 60)),
        "gallery": gallery_folder / "gallery.html",
    }


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser, written):
    """Opens a page. At the end nothing may stand on its console."""
    pages, said = [], []

    def open_page(name, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(written[name].as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["evaluation", "training", "gallery"])
def test_pages_meet_the_accessibility_rules(opened, name, width, scheme):
    page = opened(name, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    found = Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in found] == []


def test_a_slider_chooses_the_step(opened):
    page = opened("training")
    shown = "[...document.querySelectorAll('.timeline figure.shown figcaption')].map((each) => each.textContent)"
    sliders = page.locator(".slide input")
    assert sliders.count() == page.locator(".timeline").count() > 0
    last = page.evaluate(shown)
    sliders.first.focus()
    page.keyboard.press("Home")
    first = page.evaluate(shown)
    assert first[0] != last[0]
    assert first[1:] == last[1:]
    assert page.locator(".slide span").first.inner_text() == first[0]
    page.keyboard.press("End")
    assert page.evaluate(shown) == last


def test_two_images_are_compared_by_dragging(opened):
    page = opened("evaluation", 375)
    boxes = page.locator(".example .compare")
    assert boxes.count() == page.locator(".example .tiles:not(:has(.missing))").count() > 0
    box = boxes.first
    assert box.locator("img").count() == 2
    box.scroll_into_view_if_needed()
    edges = box.bounding_box()
    page.mouse.move(edges["x"] + edges["width"] / 2, edges["y"] + edges["height"] / 2)
    page.mouse.down()
    page.mouse.move(edges["x"] + edges["width"] * 0.9, edges["y"] + edges["height"] / 2, steps=4)
    page.mouse.up()
    at = box.evaluate("(each) => parseFloat(each.style.getPropertyValue('--at'))")
    assert 80 < at < 100
    bar = box.locator(".bar").bounding_box()
    assert abs(bar["x"] - edges["x"] - edges["width"] * at / 100) < 4


def test_settings_are_folded_and_the_changed_ones_are_not(opened):
    page = opened("training")
    assert page.locator("#settings tr.changed").first.is_visible()
    everything = page.locator("#settings details tr")
    assert not everything.first.is_visible()
    assert everything.count() > page.locator("#settings > .scroll tr").count() > 0
    page.click("#settings summary")
    assert everything.first.is_visible()


def test_long_curves_are_smoothed(opened):
    page = opened("long")
    assert page.locator(".chart .raw").count() > 3
    assert opened("training").locator(".chart .raw").count() == 0


def test_the_page_of_a_run_that_goes_on_is_read_again(browser, run_folder, tmp_path):
    for going in (True, False):
        path = write_training_page(run_folder(tmp_path / str(going), 3, finished=False), going=going)
        page = browser.new_page()
        page.clock.install()
        page.goto(path.as_uri())
        page.evaluate("window.mark = 1")
        page.clock.fast_forward(16_000)
        page.wait_for_timeout(500) if not going else page.wait_for_function("!window.mark")
        assert page.evaluate("Boolean(window.mark)") != going
        page.close()

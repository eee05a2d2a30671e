"""The gallery: base beside adapter, one image file and one page."""

import pytest
import torch
from PIL import Image

from esengine.base.prompt_files import read_prompts
from esengine.cli.render import GALLERY
from esengine.report import write_gallery


def test_the_eight_prompts():
    prompts = read_prompts(GALLERY)
    assert len(prompts) == 8
    subjects = ("egg roll", "spaghetti", "human eyes", "dragon", "crystal", "tiny astronaut", "butterfly", "submarine")
    assert all(subject in prompt for subject, prompt in zip(subjects, prompts, strict=True))


def test_a_gallery_of_a_run(trained, esengine, workspace):
    config, _ = trained
    code, out, _ = esengine("render", "--gallery", "--run-dir", config.run_dir, "--out", "gallery")
    assert (code, out) == (0, "gallery/gallery.png\ngallery/gallery.html\n")
    assert {path.name for path in (workspace / "gallery").iterdir()} == {"gallery.png", "gallery.html"}
    page = (workspace / "gallery" / "gallery.html").read_text()
    assert all(prompt in page for prompt in read_prompts(GALLERY))
    assert page.count("data:image/webp") == 16
    assert f"<td>{config.seed}</td>" in page
    assert f"<td>{torch.__version__}</td>" in page


@pytest.mark.parametrize("more", [["a cat"], ["--prompts-file", "p.txt"]])
def test_a_gallery_has_its_own_prompts(esengine, trained, more):
    code, out, err = esengine("render", "--gallery", "--run-dir", trained[0].run_dir, *more)
    assert (code != 0, out) == (True, "")
    assert "gallery: expected no prompts beside it" in err


@pytest.mark.parametrize(("count", "height", "width"), [(1, 16, 48), (3, 700, 600), (2, 1, 1)])
def test_pixels_are_where_their_labels_say(tmp_path, count, height, width):
    rows = {
        "base": torch.tensor([255, 0, 0]).byte().view(1, 3, 1, 1).expand(count, 3, height, width),
        "adapter": torch.tensor([0, 0, 255]).byte().view(1, 3, 1, 1).expand(count, 3, height, width),
    }
    sheet, page = write_gallery(tmp_path / "new", ["<b>" * 200] * count, rows, {})
    found = Image.open(sheet).convert("RGB")
    colours = {colour: number for number, colour in found.getcolors(1 << 24)}
    assert colours[255, 0, 0] == colours[0, 0, 255] > count * 50_000
    left = min(x for x in range(found.width) if found.getpixel((x, 200)) == (255, 0, 0))
    right = min(x for x in range(found.width) if found.getpixel((x, 200)) == (0, 0, 255))
    assert left < right
    assert "<b><b>" not in page.read_text()

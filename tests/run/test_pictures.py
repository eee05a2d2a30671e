import numpy as np
import pytest
import torch

from esengine.run.pictures import HEADER, draw_grid, draw_strip


def noise(count, height=8, width=8):
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


def test_strip_shows_every_image_unaltered_in_its_place():
    images = {"best": noise(2, 128, 160), "worst": noise(3, 128, 160)}
    picture = np.asarray(draw_strip(images, captions=["one", "two"], margin=4))
    gutter, header = picture.shape[1] - 3 * 164, picture.shape[0] - 2 * 132
    for row, label in enumerate(images):
        for column, image in enumerate(images[label].permute(0, 2, 3, 1).numpy()):
            top, left = header + row * 132, gutter + column * 164
            assert np.array_equal(picture[top : top + 128, left : left + 160], image)
    assert (picture[:header] < 128).any()  # captions
    for row in range(2):
        assert (picture[header + row * 132 :, :gutter][:128] < 128).any()  # labels
    assert (picture[header : header + 128, gutter + 2 * 164 :] == 255).all()  # best has no third image


@pytest.mark.parametrize(("size", "shown"), [((8, 8), (128, 128)), ((50, 100), (100, 200)), ((600, 1024), (300, 512))])
def test_strip_scale(size, shown):
    picture = draw_strip({"a": noise(1, *size)}, margin=0)
    assert picture.height == shown[0]
    assert picture.width - shown[1] == draw_strip({"a": noise(1, 128, 128)}, margin=0).width - 128


def test_strips_of_the_same_images_have_the_same_pixels():
    images = {"best": noise(2)}
    assert draw_strip(images, ["x"]).tobytes() == draw_strip(images, ["x"]).tobytes()


@pytest.mark.parametrize("images", [{}, {"a": noise(0)}, {"a": noise(1).float()}, {"a": noise(1)[0]}])
def test_strip_refuses(images):
    with pytest.raises(ValueError, match="images"):
        draw_strip(images)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2), (16, 4, 4)])
def test_a_grid_shows_every_image_below_its_words(count, columns, rows):
    images = noise(count, 128, 160)
    picture = np.asarray(draw_grid(images, ["two words"] * count, margin=4))
    assert picture.shape == (rows * (HEADER + 132), columns * 164 + 4, 3)
    for place, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = place // columns * (HEADER + 132), place % columns * 164 + 4
        assert np.array_equal(picture[top + HEADER : top + HEADER + 128, left : left + 160], image)
        assert (picture[top : top + HEADER, left : left + 160] < 128).any()


def test_a_grid_is_narrow_enough_to_look_at_and_repeats():
    images, words = noise(4, 1024, 1024), ["", "猫 ünicode\nnewline", "word " * 90, "x" * 500]
    assert draw_grid(images, words).size == (2 * 260 + 4, 2 * (HEADER + 260))
    assert draw_grid(images, words).tobytes() == draw_grid(images, words).tobytes()


@pytest.mark.parametrize("images", [noise(0), noise(1).float(), noise(1)[0], noise(2)])
def test_a_grid_refuses(images):
    with pytest.raises(ValueError, match=r"^(images|captions): expected .*, got "):
        draw_grid(images, ["one"])

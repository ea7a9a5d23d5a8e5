"""Sheets, strips and the closing table."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from b2ray.tracking.show import COLUMNS, ROWS, closing_table, cut, save_png, sheet, strip

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 16, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 6])
def test_a_strip_is_cut_into_the_same_pictures(tmp_path, count):
    file = tmp_path / "deep" / "strip.png"
    save_png(strip(PICTURES[:count]), file)
    np.testing.assert_array_equal(cut(file, count), PICTURES[:count])
    assert [p.name for p in file.parent.iterdir()] == ["strip.png"]


def contains(page: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture, enlarged by some whole factor, stands somewhere on the page."""
    for scale in range(1, 13):
        big = picture.repeat(scale, 0).repeat(scale, 1)
        windows = np.argwhere((page == big[0, 0]).all(-1))
        for top, left in windows:
            there = page[top : top + big.shape[0], left : left + big.shape[1]]
            if there.shape == big.shape and (there == big).all():
                return True
    return False


def test_a_sheet_shows_every_picture_of_every_block():
    prompts = ["a", "b", "a", "b", "a", "c"]
    page = sheet(prompts, [("before", PICTURES), ("after", 255 - PICTURES)])
    pixels = np.asarray(page)
    assert page.mode == "RGB"
    assert all(contains(pixels, p) for p in PICTURES)
    assert all(contains(pixels, 255 - p) for p in PICTURES)


def test_a_long_title_has_room():
    short, long = (sheet(["a"], [(t, PICTURES[:1]), ("b", PICTURES[:1])]) for t in ("a", "a" * 60))
    assert contains(np.asarray(long), PICTURES[0])
    assert long.width > short.width and long.height == short.height


def test_a_sheet_does_not_grow_without_end():
    many = np.repeat(PICTURES, 40, axis=0)
    crowded = sheet([f"p{i % 30}" for i in range(240)], [("all", many)])
    full = sheet([f"p{i % ROWS}" for i in range(ROWS * COLUMNS)], [("all", many[: ROWS * COLUMNS])])
    assert crowded.size == full.size


def test_large_pictures_are_not_enlarged():
    big = np.zeros((1, 512, 512, 3), np.uint8)
    page = sheet(["a"], [("one", big)])
    assert 512 < page.height < 600


def test_a_long_prompt_fits_its_row():
    page = sheet(["a very long prompt indeed " * 30], [("one", PICTURES[:1])])
    assert isinstance(page, Image.Image)


def test_the_closing_table_shows_before_and_after(capsys):
    pair = {"before": 0.25, "after": 0.5}
    closing_table(
        {
            "name": "mine",
            "seed": 0,
            "stages": 3,
            "reward": pair,
            "judge": {"train": {"before": 0.1, "after": 0.9}, "heldout": pair},
            "diversity": {"vendi": {"before": 3.0, "after": 2.875}},
            "reward_queries": 12345,
            "unet_evals": 67890,
            "seconds": 61.4,
            "evaluations": [{"step": 0, "reward": 0.25}],
            "files": {"LoRA": "/somewhere/lora.safetensors"},
        }
    )
    shown = capsys.readouterr().out
    assert "reward, training prompts" in shown
    for expected in (
        "mine: before and after",
        "judge, training prompts",
        "judge, unseen prompts",
        "0.100",
        "0.900",
        "2.875",
        "12,345 reward queries",
        "67,890 UNet evaluations",
        "61 s",
        "/somewhere/lora.safetensors",
    ):
        assert expected in shown


def test_the_closing_table_of_a_run_without_rewards(capsys):
    closing_table(
        {
            "name": "mine",
            "diversity": {},
            "reward_queries": 0,
            "unet_evals": 7,
            "seconds": 1.0,
            "files": {},
        }
    )
    shown = capsys.readouterr().out
    assert "0 reward queries, 7 UNet evaluations" in shown
    assert "training prompts" not in shown

"""Branch trees on disk: whole or not there, and small."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from b2ray import trees
from b2ray.trees import EXACT, SIDE, Leaf, Tree, small


def picture(height: int, width: int) -> np.ndarray:
    """A gradient: what a photograph is to a compressor, nearly."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def a_tree(leaves: int = 3, prompt: str = "ein grüner Kreis") -> Tree:
    files = [small(picture(8, 8 + k)) for k in range(leaves + 1)]
    return Tree(
        prompt,
        5,
        files[0],
        tuple(
            Leaf(f, k / 3, {"clip": k / 7, "judge": 1.0}, k - 1.0, k != 1)
            for k, f in enumerate(files[1:])
        ),
    )


@pytest.mark.parametrize("size", [(8, 8), (EXACT, 20)])
def test_a_small_picture_is_kept_exactly(size):
    found = opened(small(picture(*size)))
    assert found.format == "PNG"
    np.testing.assert_array_equal(np.asarray(found), picture(*size))


@pytest.mark.parametrize(("size", "kept"), [((512, 512), (128, 128)), ((256, 1024), (32, 128))])
def test_a_large_picture_is_made_small(size, kept):
    content = small(picture(*size))
    found = opened(content)
    assert found.format == "JPEG" and max(found.size) == SIDE
    assert (found.height, found.width) == kept
    assert len(content) < 12_000
    expected = picture(*size)[:: size[0] // kept[0], :: size[1] // kept[1]]
    assert np.abs(np.asarray(found.convert("RGB")).astype(float) - expected)[..., 0].mean() < 8


def test_trees_read_back_exactly(tmp_path):
    large = Tree("x", 2, small(picture(200, 200)), a_tree(1).leaves)
    trees.save(tmp_path, 7, [a_tree(), large])
    trees.save(tmp_path, 12, [a_tree(2, "other")])
    assert trees.stages(tmp_path) == [7, 12]
    assert trees.load(tmp_path, 7) == [a_tree(), large]
    assert trees.load(tmp_path, 12) == [a_tree(2, "other")]
    names = {p.name for p in (tmp_path / "trees" / "stage-00007").iterdir()}
    assert {"tree.json", "group0_fork.png", "group0_leaf2.png", "group1_fork.jpg"} <= names


def test_a_stage_that_is_done_again_replaces_its_trees(tmp_path):
    trees.save(tmp_path, 1, [a_tree(3), a_tree(3)])
    trees.save(tmp_path, 1, [a_tree(3, "again")])
    assert trees.load(tmp_path, 1) == [a_tree(3, "again")]


def test_trees_that_were_not_written_to_the_end_are_none(tmp_path, monkeypatch):
    trees.save(tmp_path, 1, [a_tree()])
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        for stage in (1, 2):
            with pytest.raises(OSError, match="full"):
                trees.save(tmp_path, stage, [a_tree()])
    assert trees.stages(tmp_path) == []


def test_a_run_without_trees_has_none(tmp_path):
    assert trees.stages(tmp_path) == []
    (tmp_path / "trees" / "stage-x").mkdir(parents=True)
    (tmp_path / "trees" / "stage-x" / "tree.json").touch()
    assert trees.stages(tmp_path) == []


def test_nothing_outside_the_folder_is_read(tmp_path: Path):
    """Names of files are made, not read: a run's folder may come from somebody else."""
    trees.save(tmp_path, 1, [a_tree(1)])
    place = tmp_path / "trees" / "stage-00001"
    (place / "group0_leaf0.png").unlink()
    with pytest.raises(FileNotFoundError, match="has no picture"):
        trees.load(tmp_path, 1)
    text = (place / "tree.json").read_text()
    assert "png" not in text and "picture" not in text

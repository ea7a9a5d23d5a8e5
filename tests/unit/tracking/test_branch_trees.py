"""Branch trees on disk: whole or not there, and small."""

from __future__ import annotations

from pathlib import Path

import pytest

from b2ray.diffusion.pictures import thumbnail
from b2ray.tracking import branch_trees as trees
from b2ray.tracking.branch_trees import Tree, TreeLeaf
from tests.unit.diffusion.test_pictures import picture


def a_tree(leaves: int = 3, prompt: str = "ein grüner Kreis") -> Tree:
    files = [thumbnail(picture(8, 8 + k)) for k in range(leaves + 1)]
    return Tree(
        prompt,
        5,
        files[0],
        tuple(
            TreeLeaf(f, k / 3, {"clip": k / 7, "judge": 1.0}, k - 1.0, k != 1)
            for k, f in enumerate(files[1:])
        ),
    )


def test_trees_read_back_exactly(tmp_path):
    large = Tree("x", 2, thumbnail(picture(200, 200)), a_tree(1).leaves)
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

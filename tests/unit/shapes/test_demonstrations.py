"""The command that draws a folder of demonstrations."""

from __future__ import annotations

import numpy as np
from PIL import Image

from b2ray.prompts.demonstrations import read_folder
from b2ray.shapes import Judge
from b2ray.shapes.demonstrations import main


def test_the_pictures_show_their_captions(tmp_path, capsys):
    folder = tmp_path / "demonstrations"
    assert main([str(folder), "--count", "32"]) == 0
    assert "32 pictures" in capsys.readouterr().out
    found = read_folder(str(folder))
    assert len(found) == 32 and len({d.caption for d in found}) == 8
    pictures = np.stack([np.asarray(Image.open(d.file)) for d in found])
    assert Judge().score(pictures, [d.caption for d in found]).mean() > 0.9


def test_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main([str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_seeds_draw_other_pictures(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main([str(tmp_path / name), "--count", "2", "--seed", str(seed)])
    first, same, other = (
        [(tmp_path / n / f).read_bytes() for f in ("0000.png", "0001.png")] for n in "abc"
    )
    assert first == same != other

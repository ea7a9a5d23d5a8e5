"""`b2ray report`: the page, or one sentence."""

from __future__ import annotations

import json

import pytest

from b2ray.commands.report import main
from b2ray.errors import EXIT_CONFIG, EXIT_DONE
from tests.unit.report.runs import settings, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(settings(tmp_path / "runs"), done=2)


def test_the_page_goes_into_the_runs_folder(folder, capsys):
    assert main(["mine", f"--runs={folder.path.parent}"]) == EXIT_DONE
    file = folder.path / "report.html"
    assert "After 2 of 6 stages" in file.read_text(encoding="utf-8")
    assert f"{file} (" in capsys.readouterr().out


def test_the_page_goes_where_it_is_wanted(folder, tmp_path):
    file = tmp_path / "here.html"
    assert main([str(folder.path), f"--output={file}"]) == EXIT_DONE
    assert file.is_file() and not (folder.path / "report.html").exists()
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_be_done_is_a_sentence(folder, tmp_path, capsys):
    cases = {
        ("none", f"--runs={tmp_path}"): "there is no run 'none'",
        (str(folder.path), f"--output={tmp_path}"): "is a folder: give the file's name, too",
        (
            str(folder.path),
            f"--output={tmp_path}/no/a.html",
        ): "cannot be used: No such file",
    }
    for words, said in cases.items():
        assert main(words) == EXIT_CONFIG
        assert said in capsys.readouterr().err


def test_a_broken_file_is_a_sentence(folder, capsys):
    folder.events_file.write_text("{\n")
    assert main([str(folder.path)]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said.startswith(f"b2ray: {folder.path} has a file that cannot be read")
    assert not (folder.path / "report.html").exists()


def test_for_programs_there_is_a_document(folder, capsys):
    assert main([str(folder.path), "--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(folder.path / "report.html")
    assert found["bytes"] == (folder.path / "report.html").stat().st_size

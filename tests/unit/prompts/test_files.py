"""Prompts from files: what is read, and every way a file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from b2ray.errors import ConfigError
from b2ray.prompts import PromptSet, PromptSets, read


def prompts_of(tmp_path: Path, content: str | bytes, name: str = "prompts.txt") -> PromptSet:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read("prompts.train", str(file))


# --- text ------------------------------------------------------------------------------------


def test_prompts_are_the_lines(tmp_path):
    found = prompts_of(tmp_path, "a cat\na dog")
    assert found == PromptSet(("a cat", "a dog"), (1.0, 1.0))


def test_comments_empty_lines_and_blanks_do_not_count(tmp_path):
    text = "# animals\n\n  a cat \r\n\t\n#a bear\na dog\n"
    assert prompts_of(tmp_path, text).texts == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "une forêt\n"),
        ("p.jsonl", '{"prompt": "une forêt"}\n'),
        ("p.csv", "prompt\nune forêt\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name, text):
    for encoding in ("utf-8", "utf-8-sig"):
        assert prompts_of(tmp_path, text.encode(encoding), name).texts == ("une forêt",)


def test_a_prompt_that_stands_twice_is_one(tmp_path):
    assert prompts_of(tmp_path, "a cat\na dog\na cat\n").texts == ("a cat", "a dog")


# --- JSON lines and CSV ----------------------------------------------------------------------

JSONL = """\
{"prompt": " a cat ", "weight": 2}

{"prompt": "a dog, \\"sitting\\"", "weight": null, "source": "mine"}
{"weight": 0.5, "prompt": "a\u2028line"}
{"prompt": "a dog, \\"sitting\\""}
"""
CSV = '''\
source, prompt ,weight
mine,a cat,2

mine,"a dog, ""sitting""",
,"a\u2028line",.5
mine,"a dog, ""sitting""",1.0
'''


@pytest.mark.parametrize(("name", "text"), [("p.jsonl", JSONL), ("P.CSV", CSV)])
def test_prompts_and_weights_of_a_table(tmp_path, name, text):
    found = prompts_of(tmp_path, text, name)
    assert found.texts == ("a cat", 'a dog, "sitting"', "a\u2028line")
    assert found.weights == (2.0, 1.0, 0.5)


def test_a_csv_file_of_another_system_is_the_same(tmp_path):
    assert prompts_of(tmp_path, CSV.replace("\n", "\r\n"), "p.csv") == prompts_of(
        tmp_path, CSV, "p.csv"
    )


def test_a_short_row_has_the_usual_weight(tmp_path):
    assert prompts_of(tmp_path, "prompt,weight\na cat\na dog,3\n", "p.csv").weights == (1, 3)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("p.txt", t) for t in ("", "\n\n", "# only a comment\n")),
        *(("p.jsonl", t) for t in ("", "\n \n")),
        *(("p.csv", t) for t in ("", "\n", "prompt,weight\n", "prompt\n\n")),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, text):
    with pytest.raises(ConfigError, match=r"prompts\.train: .*has no prompts; write one a line"):
        prompts_of(tmp_path, text, name)


WRONG_WEIGHTS = ["0", "-1", "NaN", "Infinity", "1e999", "true", '"two"', "[1]", "1" + "0" * 400]


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', 2, "not JSON .*; write one object a line"),
        ("p.jsonl", "a cat\n", 1, "not JSON"),
        ("p.jsonl", "[" * 100_000, 1, "not JSON"),
        ("p.jsonl", '\n["a cat"]', 2, "no object; write .*prompt.* not .*a cat"),
        ("p.jsonl", '{"Prompt": "a cat"}', 1, "there is no `prompt`"),
        ("p.jsonl", '{"prompt": null}', 1, "there is no `prompt`"),
        ("p.jsonl", '{"prompt": 7}', 1, "`prompt` is 7; write it as text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " \\n"}', 2, "`prompt` is empty"),
        *(
            ("p.jsonl", f'{{"prompt": "a", "weight": {w}}}', 1, "`weight` is .*positive finite")
            for w in WRONG_WEIGHTS
        ),
        ("p.csv", "text,weight\na cat,1\n", 1, "'text,weight' has no column `prompt`"),
        ("p.csv", "\nprompt;weight\na cat;1\n", 2, "columns separated by commas"),
        ("p.csv", "prompt\na cat\na dog, sitting\n", 3, "2 cells under a header of 1.*quotes"),
        ("p.csv", "weight,prompt\n1,\n", 2, "`prompt` is empty"),
        ("p.csv", "weight,prompt\n1\n", 2, "there is no `prompt`"),
        ("p.csv", 'prompt\na cat\n"a dog\n', 3, "not CSV"),
        *(
            ("p.csv", f"prompt,weight\na cat,{w}\n", 2, "`weight` is .*positive finite number")
            for w in ("0", "-1", "nan", "inf", "1e999", "two")
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path, name, text, line, words):
    with pytest.raises(ConfigError, match=rf"^prompts\.train: '.*', line {line}: .*{words}") as e:
        prompts_of(tmp_path, text, name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_a_prompt_with_two_weights_is_refused(tmp_path, name):
    rows = [("a cat", 2), ("a dog", 1), ("a cat", 2), ("a cat", 3)]
    lines = [json.dumps({"prompt": p, "weight": w}) for p, w in rows]
    if name == "p.csv":
        lines = ["prompt,weight", *(f"{p},{w}" for p, w in rows)]
    first, last = (1, 4) if name == "p.jsonl" else (2, 5)
    with pytest.raises(
        ConfigError, match=f"line {last}: 'a cat' has weight 3 here and 2 on line {first}"
    ):
        prompts_of(tmp_path, "\n".join(lines), name)
    assert prompts_of(tmp_path, "\n".join(lines[:-1]), name).weights == (2.0, 1.0)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"prompts\.train: .*cannot be read as UTF-8") as caught:
        prompts_of(tmp_path, "une forêt".encode("latin-1"), name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prompts", "prompts.json", "prompts.parquet"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"prompts\.train: .* is no \.txt, \.jsonl or \.csv file"):
        prompts_of(tmp_path, "a cat\n", name)


@pytest.mark.parametrize("path", ["nowhere/prompts.txt", ".", "", "template1", "template1.train2"])
def test_a_name_that_is_neither_file_nor_set_is_refused(path):
    with pytest.raises(
        ConfigError,
        match=r"^prompts\.heldout: there is no file .*built-in set .*template1\.train, .*animals",
    ) as caught:
        read("prompts.heldout", path)
    assert "\n" not in str(caught.value)


# --- the sets of a run -----------------------------------------------------------------------


def test_an_evaluation_looks_at_the_sets_that_are_there():
    one, other = PromptSet(("a", "b"), (1.0, 9.0)), PromptSet(("c",))
    assert PromptSets(one, other).evaluated() == {"train": ("a", "b"), "heldout": ("c",)}
    assert PromptSets(one).evaluated() == {"train": ("a", "b")}

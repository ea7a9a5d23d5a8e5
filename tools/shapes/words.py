"""A tokenizer with CLIP's byte-pair encoding, in whose vocabulary each word is one token."""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from b2ray.shapes.captions import COLOURS, RELATIONS, SHAPES

CONTEXT = 12
"""Tokens per prompt: at most eight words, a start, an end, and two to spare."""

_WORDS = sorted({"a", "an", *COLOURS, *SHAPES, *(w for r in RELATIONS for w in r.split())})
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer of both text encoders, which spells other words in letters."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    merges = _merges(_WORDS)
    tokens = [*letters, *("".join(pair) for pair in merges), _START, _END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=CONTEXT,
    )


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges of a byte-pair encoding that is trained until every word is one token."""
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in spelt):
        pairs = Counter(p for parts in spelt for p in pairwise(parts))
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        spelt = [_merge(parts, best) for parts in spelt]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts of a word after merging a pair wherever it occurs."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged

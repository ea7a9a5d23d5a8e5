"""Safetensors files with notes, whose bytes depend on their content alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy


def packed(tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file of arrays, with notes in its metadata."""
    return reproducible(safetensors.numpy.save(dict(sorted(tensors.items())), metadata=dict(notes)))


def reproducible(file: bytes) -> bytes:
    """The same safetensors file with its metadata sorted.

    safetensors writes the entries of the metadata in random order. Sorting them does not change
    the length of the header.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return file[:8] + text.ljust(end - 8) + file[end:]


def unpacked(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the notes of a safetensors file."""
    with safetensors.safe_open(file, framework="numpy") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return tensors, dict(stored.metadata() or {})

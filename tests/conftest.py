"""What all tests share: small models on disk, one thread, no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch or transformers are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Set explicitly, so that nothing depends on a token in the home directory.
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `reward` and `prompts.txt` (tests.models.save_all)."""
    import torch

    from tests.models import save_all

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_all(folder)
    return folder

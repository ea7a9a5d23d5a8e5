"""What all tests share: small models on disk, one thread, no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch or transformers are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Set explicitly, so that nothing depends on a token in the home directory.
os.environ["RAY_AUTH_MODE"] = "disabled"


# How long an example takes is the machine's affair.
settings.register_profile("b2ray", deadline=None)
settings.load_profile("b2ray")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `reward` and `prompts.txt` (tests.models.save_all)."""
    import torch

    from tests.models import save_all

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_all(folder)
    return folder

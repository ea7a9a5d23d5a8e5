"""Models from a local folder or from the hub, with errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from b2ray.errors import ConfigError
from b2ray.options import find


def source(path: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a folder or hub id: its name, and where to look.

    A folder that is there is never asked for on the hub. Code that comes with a model is never run;
    left open, transformers would ask on a terminal.
    """
    local = find(path)
    if local is not None:
        return str(local), {"local_files_only": True, "trust_remote_code": False}
    where = {"revision": revision} if revision else {}
    return path, {**where, "trust_remote_code": False}


def file(path: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder or hub id on this disk, fetched if need be; None if it has no such file.

    Raises:
        OSError: the hub does not answer, or has no such repository.
    """
    local = find(path)
    if local is not None:
        return local / name if (local / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except LocalEntryNotFoundError:  # an EntryNotFoundError, but the hub was not even asked
        raise
    except EntryNotFoundError:
        return None


def refusal(field: str, path: str, wanted: str, error: Exception) -> ConfigError:
    """The one sentence for a model that cannot be loaded, whatever its loader raised."""
    reason = " ".join(str(error).split())[:300]
    # Their own advice would be to run the code all the same.
    if "custom code" in reason or "remote code" in reason:
        reason = "it needs code that comes with it, and such code is never run"
    elif isinstance(error, UnpicklingError):
        reason = (
            "its weights are a pickle of more than tensors, which could run code: convert them to "
            ".safetensors where you trust them"
        )
    return ConfigError(f"{field} {path!r} cannot be loaded as {wanted}: {reason}")

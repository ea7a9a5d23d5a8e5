"""Models from a local folder or from the hub, and one-sentence errors about them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from b2ray.config.paths import find
from b2ray.errors import ConfigError


def source(path: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """The arguments of `from_pretrained` for a folder or hub id.

    A path that exists locally is never looked up on the hub. Code that comes with a model is never
    run; if the argument were left out, transformers would ask on the terminal.

    Args:
        path: a local folder or a hub id.
        revision: branch, tag or commit on the hub.

    Returns:
        The positional argument and the keyword arguments.
    """
    local = find(path)
    if local is not None:
        return str(local), {"local_files_only": True, "trust_remote_code": False}
    kwargs = {"revision": revision} if revision else {}
    return path, {**kwargs, "trust_remote_code": False}


def file(path: str, name: str, revision: str | None = None) -> Path | None:
    """The local path of a file in a folder or hub repository, downloaded if need be.

    Args:
        path: a local folder or a hub id.
        name: name of the file in it.
        revision: branch, tag or commit on the hub.

    Returns:
        The file's path, or None if the folder or repository has no such file.

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
    except LocalEntryNotFoundError:  # a subclass, but it says that the hub was not reached
        raise
    except EntryNotFoundError:
        return None


def refusal(field: str, path: str, wanted: str, error: Exception) -> ConfigError:
    """The error for a model that cannot be loaded, in one sentence.

    Args:
        field: the configuration's field that names the model.
        path: the field's value.
        wanted: what was expected there, such as "a Stable Diffusion pipeline".
        error: what the loader raised.
    """
    reason = " ".join(str(error).split())[:300]
    # The loaders' own messages advise to run the code.
    if "custom code" in reason or "remote code" in reason:
        reason = "it needs code that comes with it, and such code is never run"
    elif isinstance(error, UnpicklingError):
        reason = (
            "its weights are a pickle of more than tensors, which could run code: convert them to "
            ".safetensors where you trust them"
        )
    return ConfigError(f"{field} {path!r} cannot be loaded as {wanted}: {reason}")

"""The Hugging Face hub: the only file that knows `huggingface_hub`."""

from __future__ import annotations

from pathlib import Path

from dist_train.errors import UserError

HUB = "hf://"


def download(source: str, where: str) -> Path:
    """`hf://ORG/MODEL` or `hf://ORG/MODEL@REVISION`: a folder of the hub's cache, filled where it is not."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}.from: {source} needs huggingface_hub: pip install 'dist-train[hub]'"
        ) from error
    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"],
        )
    except Exception as error:  # of the network, the hub, or the name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}.from: {source} could not be fetched: {reason}") from error
    if not any(Path(folder).rglob("*.safetensors")):
        raise UserError(f"{where}.from: {source} has no safetensors; pickles are never read")
    return Path(folder)

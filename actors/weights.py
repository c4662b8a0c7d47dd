"""Weights: where they are, and what identifies them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from actors.errors import ModelError

log = logging.getLogger(__name__)


def hash_weights(weights: Path) -> str:
    """SHA-256 over a weights file, or over the sorted files of an export folder (relative names and contents).

    Raises:
        ModelError: there is no such file or folder.
    """
    if not weights.exists():
        raise ModelError(f"No weights at {weights}: give the path of a file or folder that ultralytics.YOLO can load")
    if weights.is_file():
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in weights.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(weights)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_weights(name: str) -> Path | None:
    """Weights that Ultralytics knows by ``name``: here, in its weights folder, or by its own download; None if nowhere."""
    if Path(name).is_file():
        return Path(name)
    from ultralytics.utils import ONLINE, SETTINGS
    from ultralytics.utils.downloads import attempt_download_asset

    kept = Path(SETTINGS["weights_dir"]) / name
    if kept.is_file() or not ONLINE:
        return kept if kept.is_file() else None
    try:
        found = Path(attempt_download_asset(kept))
    except Exception as error:  # a firewall, a full disk: whatever it is, the weights are not to be had
        log.warning("%s could not be downloaded: %s", name, error)
        return None
    return found if found.is_file() else None

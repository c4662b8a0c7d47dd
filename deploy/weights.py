"""Which weights a command runs: those it was given, else ``yolo26n.pt``, else the embedded demonstration model."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.errors import ModelError
from actors.model import find_weights
from actors.settings import ModelSettings

DEFAULT_WEIGHTS = "yolo26n.pt"
EMBEDDED = ModelSettings(name="parts", weights=str(Path(__file__).parent / "demo" / "parts.pt"))


def models_from_flags(flags: Sequence[str], say: Callable[[str], None]) -> list[ModelSettings]:
    """Read ``--model`` flags; without any find the default, and say so where it cannot be had.

    Args:
        flags: ``NAME=WEIGHTS`` or ``WEIGHTS``, each.
        say: prints one line to the user.

    Raises:
        ModelError: there are no such weights on this machine, and no cluster is joined that may have them.
    """
    if flags:
        return [_located(ModelSettings.from_flag(flag)) for flag in flags]
    weights = find_weights(DEFAULT_WEIGHTS)
    if weights is not None:
        return [ModelSettings.from_flag(str(weights))]
    say(
        f"{DEFAULT_WEIGHTS} is neither here nor in Ultralytics' weights folder and cannot be downloaded:"
        f" using the embedded demonstration model, which knows nuts, bolts, washers and gears only."
        f" Put {DEFAULT_WEIGHTS} into this folder, or give --model WEIGHTS"
    )
    return [EMBEDDED]


def _located(model: ModelSettings) -> ModelSettings:
    """With the weights' real place: a bare name is also looked up where Ultralytics keeps and gets its own."""
    weights = Path(model.weights)
    if weights.exists() or model.weights.startswith("fake:") or "RAY_ADDRESS" in os.environ:
        return model
    found = find_weights(model.weights) if weights.name == model.weights else None
    if found is None:
        raise ModelError(f"No weights at {weights}: give the path of a file or folder that ultralytics.YOLO can load")
    return model.model_copy(update={"weights": str(found)})

"""Which weights a command runs: those it was given, else ``yolo26n.pt``, else the embedded demonstration model."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.errors import ModelError
from actors.settings import ModelSettings
from actors.weights import find_weights

DEFAULT_WEIGHTS = "yolo26n.pt"
EMBEDDED = ModelSettings(name="parts", weights=str(Path(__file__).parent / "demo" / "parts.pt"), engine="torch")


def models_from_flags(flags: Sequence[str], say: Callable[[str], None], **settings: Any) -> list[ModelSettings]:
    """Read ``--model`` flags; without any find the default, and say so where it cannot be had.

    Args:
        flags: ``NAME=WEIGHTS`` or ``WEIGHTS``, each.
        say: prints one line to the user.
        settings: further fields of each model's.

    Raises:
        ModelError: there are no such weights on this machine, and no cluster is joined that may have them.
        ValidationError: these settings do not go together.
    """
    return [ModelSettings.model_validate(model.model_dump() | settings) for model in _from_flags(flags, say)]


def flags_of(model: ModelSettings) -> list[str]:
    """What makes ``yolofleet serve`` and ``predict`` run this model: the inverse of ``models_from_flags``."""
    flags = ["--model", f"{model.name}={model.weights}", "--engine", model.engine, "--precision", model.precision]
    flags += [] if model.decode == "exact" else ["--decode", model.decode]
    return flags + ([] if model.calibrate is None else ["--calibrate", model.calibrate])


def _from_flags(flags: Sequence[str], say: Callable[[str], None]) -> list[ModelSettings]:
    if flags:
        return [_located(ModelSettings.from_flag(flag)) for flag in flags]
    weights = find_weights(DEFAULT_WEIGHTS)
    if weights is not None:
        return [ModelSettings.from_flag(str(weights.absolute()))]
    say(
        f"{DEFAULT_WEIGHTS} is neither here nor in Ultralytics' weights folder and cannot be downloaded:"
        f" using the embedded demonstration model, which knows nuts, bolts, washers and gears only."
        f" Put {DEFAULT_WEIGHTS} into this folder, or give --model WEIGHTS"
    )
    return [EMBEDDED]


def _located(model: ModelSettings) -> ModelSettings:
    """With the weights' whole path, since actors of a joined cluster start in another folder.

    A bare name is also looked up where Ultralytics keeps and gets its own.
    """
    weights = Path(model.weights)
    if model.weights.startswith("fake:") or ("RAY_ADDRESS" in os.environ and not weights.exists()):
        return model
    found = weights if weights.exists() else find_weights(model.weights) if weights.name == model.weights else None
    if found is None:
        raise ModelError(f"No weights at {weights}: give the path of a file or folder that ultralytics.YOLO can load")
    return model.model_copy(update={"weights": str(found.absolute())})

"""What a model is and what an actor may take. One declaration each; command-line flags and YAML are views of these."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error, never silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageLimits(Settings):
    """What an encoded image may weigh. Pixels are read from the header and refused before anything is decoded."""

    max_image_mb: Annotated[float, Field(gt=0)] = 20.0
    max_megapixels: Annotated[float, Field(gt=0)] = 50.0
    max_side_px: Annotated[int, Field(gt=0)] = 16384


class ModelSettings(Settings):
    """One model: where its weights are and how they are run.

    ``weights`` is whatever ``ultralytics.YOLO`` loads (.pt, .onnx, OpenVINO folder, .engine, .torchscript).
    """

    name: Annotated[str, Field(pattern=MODEL_NAME)]
    weights: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8

    @field_validator("weights")
    @classmethod
    def _not_empty(cls, weights: str) -> str:
        if not weights.strip():
            raise ValueError("weights is empty: give the path of a weights file")
        return weights

    @classmethod
    def from_flag(cls, flag: str) -> ModelSettings:
        """Read ``NAME=WEIGHTS``, or plain ``WEIGHTS``, whose file name without its suffix becomes the name."""
        name, separator, weights = flag.partition("=")
        if separator and re.fullmatch(MODEL_NAME, name):
            return cls(name=name, weights=weights)
        stem = Path(flag).name.split(".")[0].partition("?")[0]
        return cls(name=re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "model", weights=flag)


class ActorSettings(Settings):
    """What one actor reserves. ``num_gpus`` is any fraction up to 1 or a whole number, as Ray has it."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("num_gpus")
    @classmethod
    def _fraction_or_whole(cls, num_gpus: float) -> float:
        if num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError(f"num_gpus is {num_gpus}: give a fraction up to 1, or a whole number")
        return num_gpus

    @property
    def threads(self) -> int:
        """Engine threads that follow from ``num_cpus``: its whole part, at least one."""
        return max(int(self.num_cpus), 1)

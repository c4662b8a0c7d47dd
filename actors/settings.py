"""What a model is and what an actor may take. One declaration each; command-line flags and YAML are views of these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Engine = Literal["auto", "torch", "openvino", "onnx", "tensorrt"]
EnginePrecision = Literal["auto", "fp32", "fp16", "int8"]
Decode = Literal["exact", "reduced"]

STREAM_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
REGION_NAME = r"^[\w .:-]{1,64}$"
MAX_COORDINATE = 16384.0
MAX_REGIONS = 32
MAX_ZONE_PIXELS = 50e6  # of the masks that supervision makes, each from the frame's corner to its zone's farthest point
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error, never silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageLimits(Settings):
    """What an encoded image or video may weigh. Pixels are read from the header and refused before anything is decoded.

    ``max_video_frames`` counts the frames that are computed, so that a stride makes room for a longer video.
    """

    max_image_mb: Annotated[float, Field(gt=0)] = 20.0
    max_megapixels: Annotated[float, Field(gt=0)] = 50.0
    max_side_px: Annotated[int, Field(gt=0)] = 16384
    max_video_mb: Annotated[float, Field(gt=0)] = 100.0
    max_video_frames: Annotated[int, Field(ge=1)] = 900


class ModelSettings(Settings):
    """One model: where its weights are and how they are run.

    ``weights`` is whatever ``ultralytics.YOLO`` loads (.pt, .onnx, OpenVINO folder, .engine, .torchscript). ``engine`` and
    ``precision`` say what computes ``.pt`` weights: ``auto`` takes the fastest that agrees with the original (see
    ``actors/engines.py``). ``calibrate`` is the folder of images that int8 is fitted to.
    ``decode`` says whether a large JPEG's pixels are those that ``YOLO.predict`` sees, or those of a decoder that reads it at
    reduced scale in less time.
    """

    name: Annotated[str, Field(pattern=MODEL_NAME)]
    weights: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8
    engine: Engine = "auto"
    precision: EnginePrecision = "auto"
    calibrate: str | None = None
    decode: Decode = "exact"

    @model_validator(mode="after")
    def _calibrated(self) -> ModelSettings:
        if (self.precision == "int8") != (self.calibrate is not None):
            raise ValueError("precision int8 needs calibrate, a folder of images to fit it to; no other precision takes one")
        return self

    @field_validator("weights")
    @classmethod
    def _not_empty(cls, weights: str) -> str:
        if not weights.strip():
            raise ValueError("weights is empty: give the path of a weights file")
        return weights

    @classmethod
    def from_flag(cls, flag: str) -> ModelSettings:
        """Read ``NAME=WEIGHTS``, or plain ``WEIGHTS``, whose file name without its suffix becomes the name.

        ``@sha256:HEX`` behind either pins the weights' content.
        """
        flag, pinned, sha256 = flag.partition("@sha256:")
        pin = sha256.lower() if pinned else None
        name, separator, weights = flag.partition("=")
        if separator and re.fullmatch(MODEL_NAME, name):
            return cls(name=name, weights=weights, sha256=pin)
        stem = Path(flag).name.split(".")[0].partition("?")[0]
        return cls(name=re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "model", weights=flag, sha256=pin)


class TrackerSettings(Settings):
    """A tracker of Ultralytics': ``overrides`` are what differs from the settings that it comes with (bytetrack.yaml, …)."""

    kind: Literal["bytetrack", "botsort"] = "botsort"
    overrides: dict[str, float | bool | str] = {}


RegionName = Annotated[str, Field(pattern=REGION_NAME)]
Coordinate = Annotated[float, Field(ge=0, le=MAX_COORDINATE)]
Place = tuple[Coordinate, Coordinate]


class Regions(Settings):
    """Where a live stream counts what passes: named lines of two points, named zones of three or more.

    Points are x, y in pixels of the frame. ``anchor`` is the point of an object's box that passes: its centre, or where the
    object stands. What is in and out is in ``actors/crossings.py``.
    """

    lines: dict[RegionName, tuple[Place, Place]] = {}
    zones: dict[RegionName, Annotated[tuple[Place, ...], Field(min_length=3, max_length=64)]] = {}
    anchor: Literal["center", "bottom_center"] = "center"

    @classmethod
    def from_texts(cls, lines: str | None, zones: str | None, anchor: str | None) -> Regions | None:
        """Read what a query or flags say, lines and zones as JSON; None if they say nothing."""
        given = {"lines": lines, "zones": zones, "anchor": anchor}
        told = {name: text for name, text in given.items() if text is not None}
        return cls.model_validate(told) if told else None

    @field_validator("lines", "zones", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError('this is no JSON: write {"gate": [[0, 240], [640, 240]]}') from None

    @model_validator(mode="after")
    def _can_be_counted_at(self) -> Regions:
        if len(self.lines) + len(self.zones) > MAX_REGIONS:
            raise ValueError(f"there are more than {MAX_REGIONS} lines and zones: give fewer")
        if both := sorted(self.lines.keys() & self.zones.keys()):
            raise ValueError(f"'{both[0]}' is a line and a zone: give each a name of its own")
        for name, (start, end) in self.lines.items():
            if start == end:
                raise ValueError(f"the line '{name}' has no length: give two different points")
        if sum(max(x for x, _ in ring) * max(y for _, y in ring) for ring in self.zones.values()) > MAX_ZONE_PIXELS:
            raise ValueError("the zones reach too far: give pixels of the frame")
        return self


class StreamSettings(Settings):
    """A live stream: its name, the model that detects in its frames, the tracker that follows, and where it counts.

    ``regions`` None leaves those of a stream that runs as they are.
    """

    stream: Annotated[str, Field(pattern=STREAM_NAME)]
    model: str
    tracker: TrackerSettings = TrackerSettings()
    regions: Regions | None = None

    def fits(self, other: StreamSettings) -> bool:
        """Whether one stream can be both: regions may change while it runs, all else may not."""
        return (self.stream, self.model, self.tracker) == (other.stream, other.model, other.tracker)


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

"""What travels: parameters in, results out. Frozen, complete for every task, made of plain Python values.

    bytes + PredictParams  →  Detector  →  ImageResult( Detection, Detection, … )

Coordinates are pixels of the original image after EXIF rotation, x to the right and y down. Nothing here holds a tensor,
so that a result costs little to pickle and can be compared with ``==``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from actors.errors import BadRequest

Task = Literal["detect", "segment", "classify", "pose", "obb"]
TASKS: tuple[Task, ...] = get_args(Task)

MAX_IMGSZ = 4096
MAX_DETECTIONS = 10_000


@dataclass(frozen=True, slots=True)
class PredictParams:
    """Thresholds of one call, with the names, meanings and defaults of ``YOLO.predict``.

    Attributes:
        conf: lowest confidence that is reported, 0..1.
        iou: highest overlap that non-maximum suppression leaves, 0..1; no effect on end-to-end models.
        imgsz: letterbox target as (height, width) in pixels; None takes the model's own.
        classes: class ids to keep; None keeps all.
        max_det: most detections per image.
        agnostic_nms: suppress across classes.
        rect: letterbox to the smallest rectangle that holds the image, not to the whole of ``imgsz``.
        multi_label: report every class of a box above ``conf``, not its best only. ``YOLO.val`` does so and
            ``YOLO.predict`` cannot; for evaluation, on the task ``detect``.
    """

    conf: float = 0.25
    iou: float = 0.7
    imgsz: tuple[int, int] | None = None
    classes: tuple[int, ...] | None = None
    max_det: int = 300
    agnostic_nms: bool = False
    rect: bool = True
    multi_label: bool = False

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            if not 0.0 <= getattr(self, name) <= 1.0:  # also refuses NaN
                raise BadRequest(f"'{name}' is {getattr(self, name)}; give a number from 0 to 1")
        if self.imgsz is not None and not all(32 <= side <= MAX_IMGSZ for side in self.imgsz):
            raise BadRequest(f"'imgsz' is {list(self.imgsz)}; give sides from 32 to {MAX_IMGSZ} pixels")
        if not 1 <= self.max_det <= MAX_DETECTIONS:
            raise BadRequest(f"'max_det' is {self.max_det}; give a number from 1 to {MAX_DETECTIONS}")
        if self.classes is not None and any(not 0 <= class_id < 100_000 for class_id in self.classes):
            raise BadRequest(f"'classes' is {list(self.classes)}; give class ids, which start at 0")

    def as_dict(self) -> dict[str, Any]:
        """The parameters as JSON-ready values, for summaries and manifests."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Points:
    """Named coordinates of an outline or a skeleton, pixels; ``visible`` is 0..1 where the model tells it."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    visible: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Detection:
    """One object, or for the task ``classify`` one of the five likeliest classes.

    Attributes:
        class_id: index into the model's names.
        name: the class's name.
        confidence: 0..1.
        box: x1, y1, x2, y2 in pixels; None for ``classify`` and ``obb``.
        corners: the four corners of an oriented box; only for ``obb``.
        segments: outline of the mask; only for ``segment``.
        keypoints: the skeleton's points; only for ``pose``.
        track_id: identity within one stream or video, where it is tracked.
    """

    class_id: int
    name: str
    confidence: float
    box: tuple[float, float, float, float] | None = None
    corners: Points | None = None
    segments: Points | None = None
    keypoints: Points | None = None
    track_id: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Where one image's time went, milliseconds. ``batch_size`` is how many images shared its forward pass."""

    decode: float = 0.0
    queue: float = 0.0
    preprocess: float = 0.0
    inference: float = 0.0
    postprocess: float = 0.0
    batch_size: int = 1


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Everything a model says about one image of ``width`` x ``height`` pixels."""

    width: int
    height: int
    task: Task
    detections: tuple[Detection, ...]
    timing: Timing = field(default=Timing(), compare=False)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is, as ``/models`` tells it.

    Attributes:
        name: the name it is served under.
        weights: base name of the weights file or folder.
        sha256: hash over the weights' content, hexadecimal.
        task: one of ``TASKS``.
        names: class id → class name.
        imgsz: default letterbox target (height, width) in pixels.
        engine: what computes: torch, openvino, onnx, tensorrt, …
        device: cpu, cuda:0, …
        versions: of the packages that decide the answers.
    """

    name: str
    weights: str
    sha256: str
    task: Task
    names: dict[int, str]
    imgsz: tuple[int, int]
    engine: str
    device: str
    versions: dict[str, str]

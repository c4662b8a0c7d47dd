"""What travels: parameters in, results out. Frozen, complete for every task, made of plain Python values.

    bytes + PredictParams  →  Detector  →  ImageResult( Detection, Detection, … )

Coordinates are pixels of the original image after EXIF rotation, x to the right and y down. Nothing here holds a tensor,
so that a result costs little to pickle and can be compared with ``==``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actors.errors import BadRequest

Task = Literal["detect", "segment", "classify", "pose", "obb"]
TASKS: tuple[Task, ...] = get_args(Task)

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)  # in the order in which they are served

Precision = Literal["fp32", "fp16", "int8", "unknown"]

Counts = dict[str, dict[str, dict[str, int]]]
"""What has passed: line or zone → ``in``, ``out``, for a zone also ``inside`` → class name → objects."""

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
    """Where one image's time went, milliseconds.

    Attributes:
        queue: from its arrival at the fleet until a replica had it.
        decode: decoding and letterbox, in the replica.
        batch_wait: from then until its batch began.
        preprocess: its share of the batch's conversion to a tensor.
        inference: its share of the forward pass.
        postprocess: suppression and scaling.
        batch_size: how many images shared its forward pass; 1 in an engine that computes each by itself.
        engine: how long it was in the engine: all of its batch's preprocess and inference, or its own beside other images.
    """

    queue: float = 0.0
    decode: float = 0.0
    batch_wait: float = 0.0
    preprocess: float = 0.0
    inference: float = 0.0
    postprocess: float = 0.0
    batch_size: int = 1
    engine: float = 0.0


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
        stride: both sides of a raw tensor are multiples of it, pixels.
        dynamic: whether the engine takes tensors of any size; else of ``imgsz`` only.
        end2end: whether the raw outputs are detections already, which need no suppression.
        kpt_shape: (points, values a point) of a skeleton; only for ``pose``.
        output_shapes: of the raw outputs in their order; -1 where a length follows from the input.
        precision: fp32, fp16 or int8 as the engine computes; unknown where an export does not tell.
        gpu_peak_bytes: the most GPU memory that the replica which tells this has reserved so far; None without a GPU.
        engine_reason: why this engine and no other, a sentence.
        settled: whether the engine stays; else a faster one is being made.
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
    stride: int = 32
    dynamic: bool = False
    end2end: bool = False
    kpt_shape: tuple[int, int] | None = None
    output_shapes: tuple[tuple[int, ...], ...] = ()
    precision: Precision = "unknown"
    gpu_peak_bytes: int | None = None
    engine_reason: str = ""
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """One image's result and where it was computed.

    Attributes:
        result: what the model says.
        replica: Ray's actor id of the replica, hexadecimal.
        picture: the image with the detections drawn into it, as JPEG, where that was asked for.
    """

    result: ImageResult
    replica: str
    picture: bytes | None = None


@dataclass(frozen=True, slots=True)
class TensorAnswer:
    """The raw outputs of one forward pass over a caller's own tensor.

    Attributes:
        outputs: the engine's output arrays in its own order, float32, the first axis being the batch.
        replica: Ray's actor id of the replica, hexadecimal.
        timing: milliseconds of the whole tensor.
    """

    outputs: tuple[NDArray[np.float32], ...]
    replica: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a request is answered.

    Attributes:
        deadline: ``time.monotonic()`` of this process until which an answer is of use.
        priority: which requests are served first when there is a queue.
        request_id: of the HTTP request, one for all its images.
        patient: it waits for room where a queue is full, instead of being refused.
    """

    deadline: float
    priority: Priority = "normal"
    request_id: str = ""
    patient: bool = False


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How a model is doing now.

    Attributes:
        replicas: that run.
        starting: replicas that load.
        waiting: requests in this ingress's queue.
        in_flight: images sent to replicas and not answered yet.
    """

    replicas: int
    starting: int
    waiting: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a replica's process knows of itself.

    Attributes:
        actor: Ray's actor id of the replica, hexadecimal.
        memory_bytes: what the process has in memory now.
        gpu_peak_bytes: the most GPU memory that it has reserved so far; None without a GPU.
        batches: sizes of its latest forward passes, the newest last.
        engine: what computes there, and in which precision.
    """

    actor: str
    memory_bytes: int
    gpu_peak_bytes: int | None
    batches: tuple[int, ...]
    engine: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica as the fleet sees it; None is what is not known.

    Attributes:
        id: Serve's name for it.
        actor: Ray's actor id, hexadecimal, as in ``X-Replica``.
        node: its node's address.
        node_id: Ray's id of it, hexadecimal, as ``ray drain-node`` takes it.
        state: Serve's (STARTING, RUNNING, STOPPING, …), or DEAD for one that died and that Serve has not replaced yet.
        started_at: seconds since the epoch.
        vitals: what it tells of itself.
    """

    id: str
    actor: str | None
    node: str | None
    node_id: str | None
    state: str
    started_at: float
    vitals: Vitals | None


@dataclass(frozen=True, slots=True)
class Death:
    """A replica that died, rather than was stopped; ``seen_at`` in seconds since the epoch."""

    actor: str
    node: str | None
    seen_at: float


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model and everything that stands behind it now.

    Attributes:
        name: the name it is served under.
        info: what it is; None before a replica has told.
        status: its load.
        target: replicas that there shall be; None where it is not known.
        num_cpus: what each replica reserves.
        num_gpus: the same of GPUs, a fraction or a whole number.
        replicas: those there are.
        deaths: replicas that died since this ingress started, of those it noticed.
        latest_deaths: the latest of them, the newest last.
    """

    name: str
    info: ModelInfo | None
    status: ModelStatus
    target: int | None
    num_cpus: float
    num_gpus: float
    replicas: tuple[ReplicaReport, ...]
    deaths: int
    latest_deaths: tuple[Death, ...]


@dataclass(frozen=True, slots=True)
class FleetReport:
    """The whole fleet as one of its ingresses sees it: queues and deaths are what this one has seen.

    Attributes:
        ingress: Ray's actor id of that ingress.
        ingresses: how many there shall be; None where it is not known.
        models: the served models, the primary one first.
    """

    ingress: str
    ingresses: int | None
    models: tuple[ModelReport, ...]


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How far a dataset job is: inputs in all, done by earlier runs, done by this one, and of these the dead letters."""

    total: int
    resumed: int
    done: int
    failed: int


@dataclass(frozen=True, slots=True)
class JobReport:
    """A dataset job; times in seconds since the epoch, None for what has not come yet or is not known.

    Attributes:
        id: Ray's submission id; of a job that was not submitted, that of its driver.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED, or LOST for a driver that does not tell any more.
        entrypoint: its command.
        started_at: when it began.
        ended_at: when it ended.
        message: what there is to say about its status.
        out: where its results are.
        counts: how far it is.
    """

    id: str
    status: str
    entrypoint: str
    started_at: float | None
    ended_at: float | None
    message: str
    out: str | None = None
    counts: JobCounts | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One committed result, with a small picture of its input as JPEG, None where that cannot be read any more."""

    name: str
    picture: bytes | None
    result: ImageResult


@dataclass(frozen=True, slots=True)
class Gallery:
    """A few results of a job, and some of its dead letters with ``uri``, ``stage`` and ``reason``."""

    samples: tuple[Sampled, ...]
    dead_letters: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one frame of a live stream brings to its tracker.

    Attributes:
        result: what was found in it.
        image: the frame, encoded; None if the tracker needs no pixels.
        dropped: frames before it that were skipped since the last sighting.
        connection: who sends it; "" for whoever has no connection.
        number: of the sighting, rising within a connection, so that one that is sent again is followed once.
    """

    result: ImageResult
    image: bytes | None
    dropped: int
    connection: str
    number: int


@dataclass(frozen=True, slots=True)
class Tracked:
    """A frame's tracked objects, how many frames its stream has ``dropped`` so far, and what has passed its regions."""

    result: ImageResult
    dropped: int
    counts: Counts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """How a live stream is doing, as ``/streams`` tells it.

    Attributes:
        stream: its name.
        model: which detects in its frames.
        tracker: which follows.
        frames: that were followed.
        dropped: frames that were skipped.
        idle_s: seconds since the last frame.
        regions: its lines and zones, as ``PUT /streams/{stream}/regions`` takes them.
        counts: what has passed them.
    """

    stream: str
    model: str
    tracker: str
    frames: int
    dropped: int
    idle_s: float
    regions: dict[str, Any]
    counts: Counts

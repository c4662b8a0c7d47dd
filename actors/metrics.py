"""Every metric, declared once. Ray exports them on its Prometheus endpoint with the prefix ``ray_``.

    Ingress      requests by outcome, retries, queue, streams, the stage ``queue`` ┐
    ModelReplica the stages from ``decode`` on, batches, GPU memory                ├─→ Ray's agent on the node ─→ Prometheus
    a job        its inputs by outcome, as they are committed                      ┘

Labels are ``model``, ``version`` (the first twelve digits of the weights' SHA-256) and ``task``; replicas and requests are
never labels of ours, so that the number of series stays small. Ray adds its own labels for node and worker.
``docs/metrics.md`` is the same list for operators; a test compares them.
"""

from __future__ import annotations

from dataclasses import fields

from ray.util.metrics import Counter, Gauge, Histogram

from actors.errors import UnknownModel
from actors.schemas import ModelInfo, ModelStatus, Timing

LABELS = ("model", "version", "task")
STAGES = tuple(field.name for field in fields(Timing) if field.name not in ("batch_size", "engine"))
TENSOR_STAGES = ("batch_wait", "inference")  # a caller's own tensor goes through no others
SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]

DECLARED: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "yolofleet_requests": (
        Counter,
        "images, tensors and videos by outcome: ok, cancelled, or the error's code",
        ("outcome",),
    ),
    "yolofleet_request_seconds": (Histogram, "from arrival at the ingress to the answer, whatever it was", ()),
    "yolofleet_queue_depth": (Gauge, "requests waiting for admission at this ingress", ()),
    "yolofleet_in_flight": (Gauge, "images sent to replicas by this ingress and not answered yet", ()),
    "yolofleet_retries": (Counter, "images sent again because their replica died", ()),
    "yolofleet_streams": (Gauge, "live streams that are connected to this ingress", ()),
    "yolofleet_stream_frames": (
        Counter,
        "live streams' frames by outcome: answered, or dropped for newer ones",
        ("outcome",),
    ),
    "yolofleet_stage_seconds": (Histogram, "one image's time in a stage, of those that were answered", ("stage",)),
    "yolofleet_batch_size": (Histogram, "images that were taken together; they share a forward pass, but on OpenVINO", ()),
    "yolofleet_gpu_memory_bytes": (Gauge, "GPU memory that the replica's process has reserved", ()),
    "yolofleet_gpu_peak_bytes": (Gauge, "the most GPU memory that the replica's process has reserved so far", ()),
    "yolofleet_job_inputs": (Counter, "dataset jobs' inputs as they are committed: result, or dead_letter", ("outcome",)),
}

Labels = dict[str, str]


def _make(name: str) -> Counter | Gauge | Histogram:
    kind, description, extra = DECLARED[name]
    boundaries = {"boundaries": SIZES if name.endswith("_size") else SECONDS} if kind is Histogram else {}
    return kind(name, description=description, tag_keys=(*LABELS, *extra), **boundaries)


def _labels(model: str, info: ModelInfo | None) -> Labels:
    """Empty where nothing is known, as before a model's first replica has told what it is."""
    return {"model": model, "version": info.sha256[:12] if info else "", "task": info.task if info else ""}


class ReplicaMetrics:
    """What one replica reports: stages, batches, memory.

    Args:
        info: the model whose labels they carry.
    """

    def __init__(self, info: ModelInfo) -> None:
        self._labels = _labels(info.name, info)
        self._of_stage = {stage: {**self._labels, "stage": stage} for stage in STAGES}
        self._stages = _make("yolofleet_stage_seconds")
        self._batches = _make("yolofleet_batch_size")
        self._memory = _make("yolofleet_gpu_memory_bytes")
        self._peak = _make("yolofleet_gpu_peak_bytes")

    def image(self, timing: Timing) -> None:
        """One image was answered. The stage ``queue`` is the ingress's to report."""
        for stage in STAGES[1:]:
            self._stages.observe(getattr(timing, stage) / 1e3, tags=self._of_stage[stage])

    def tensor(self, timing: Timing) -> None:
        """A caller's own tensor was answered: one forward pass, and no other stages."""
        for stage in TENSOR_STAGES:
            self._stages.observe(getattr(timing, stage) / 1e3, tags=self._of_stage[stage])
        self.batch(timing.batch_size)

    def batch(self, size: int) -> None:
        """One forward pass was made over ``size`` images."""
        self._batches.observe(size, tags=self._labels)

    def memory(self, size: int | None, peak: int | None) -> None:
        """The process has ``size`` bytes of GPU memory, and has had ``peak``; None without a GPU."""
        if size is not None and peak is not None:
            self._memory.set(size, tags=self._labels)
            self._peak.set(peak, tags=self._labels)


class JobMetrics:
    """What a dataset job's driver reports; the task is not known to it.

    Args:
        model: its name.
        sha256: of its weights.
    """

    def __init__(self, model: str, sha256: str) -> None:
        self._labels = {"model": model, "version": sha256[:12], "task": ""}
        self._inputs = _make("yolofleet_job_inputs")

    def committed(self, results: int, dead_letters: int) -> None:
        """A shard was."""
        for outcome, count in (("result", results), ("dead_letter", dead_letters)):
            if count:
                self._inputs.inc(count, tags={**self._labels, "outcome": outcome})


class IngressMetrics:
    """What an ingress reports: requests by outcome, its queue, retries."""

    def __init__(self) -> None:
        self._requests = _make("yolofleet_requests")
        self._seconds = _make("yolofleet_request_seconds")
        self._queue = _make("yolofleet_queue_depth")
        self._in_flight = _make("yolofleet_in_flight")
        self._retries = _make("yolofleet_retries")
        self._stages = _make("yolofleet_stage_seconds")
        self._streams = _make("yolofleet_streams")
        self._stream_frames = _make("yolofleet_stream_frames")

    def answered(self, model: str, info: ModelInfo | None, outcome: str, seconds: float) -> None:
        """An image, a tensor or a video was answered: ``ok``, or the code of its error."""
        labels = _labels(model, info)
        self._requests.inc(tags={**labels, "outcome": outcome})
        self._seconds.observe(seconds, tags=labels)

    def queued(self, model: str, info: ModelInfo | None, seconds: float) -> None:
        """Something that was answered had waited here and on the way."""
        self._stages.observe(seconds, tags={**_labels(model, info), "stage": "queue"})

    def unknown(self) -> None:
        """A model was asked for that is not served. Its name is no label: whoever asks could make series without end."""
        self._requests.inc(tags={**_labels("", None), "outcome": UnknownModel.code})

    def load(self, info: ModelInfo, status: ModelStatus) -> None:
        """How long the queue is now."""
        labels = _labels(info.name, info)
        self._queue.set(status.waiting, tags=labels)
        self._in_flight.set(status.in_flight, tags=labels)

    def streams(self, model: str, info: ModelInfo | None, count: int) -> None:
        """So many live streams are connected now."""
        self._streams.set(count, tags=_labels(model, info))

    def stream_frame(self, model: str, info: ModelInfo | None, dropped: int) -> None:
        """A live stream's frame was answered, and ``dropped`` ones before it were not."""
        labels = _labels(model, info)
        self._stream_frames.inc(tags={**labels, "outcome": "answered"})
        if dropped:
            self._stream_frames.inc(dropped, tags={**labels, "outcome": "dropped"})

    def retried(self, model: str, info: ModelInfo | None) -> None:
        """An image is sent again, because its replica died."""
        self._retries.inc(tags=_labels(model, info))

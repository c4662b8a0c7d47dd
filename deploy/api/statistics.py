"""What each model has answered through this process: counts and cumulative times, for KServe's ``…/stats``.

    Call.detect, frames, infer → ModelStatistics.succeeded / failed → counts, nanoseconds

Every dialect's work counts, since all go through Call. Another ingress process has counts of its own.
"""

import math
import time
from dataclasses import dataclass, field

from actors.schemas import Timing
from deploy.api.fleet import Fleet
from deploy.api.recent import Recent


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, milliseconds: float, count: int = 1) -> None:
        """Count it once more, or ``count`` times that took ``milliseconds`` together."""
        self.count += count
        self.ns += round(1e6 * milliseconds)


@dataclass(slots=True)
class Stages:
    """Cumulative times of the same pieces of work, stage by stage.

    Attributes:
        queue: waiting, before a replica and for a batch.
        compute_input: decoding, letterbox, conversion to a tensor.
        compute_infer: the forward pass.
        compute_output: suppression and scaling.
    """

    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)

    def add(self, timing: Timing) -> None:
        """Add one answer's stages."""
        self.queue.add(timing.queue + timing.batch_wait)
        self.compute_input.add(timing.decode + timing.preprocess)
        self.compute_infer.add(timing.inference)
        self.compute_output.add(timing.postprocess)


@dataclass(slots=True)
class Batches:
    """The forward passes of one batch size, by the images that they answered."""

    images: int = 0
    stages: Stages = field(default_factory=Stages)

    def executions(self, size: int) -> int:
        """How many passes they were: the images that shared one count it once, from the first of them on."""
        return math.ceil(self.images / size)


class ModelStatistics:
    """One model's counters.

    Attributes:
        success: answered calls and the time from asking to the answer.
        fail: calls that ended in an error, the client's own ones too; those that a client gave up are in neither.
        stages: where the time of the answered went.
        batches: batch size → its forward passes.
        last_inference_ms: milliseconds since the epoch of the last answer; 0 before the first.
        recent: the last minute's calls.
    """

    def __init__(self) -> None:
        self.success, self.fail = Duration(), Duration()
        self.stages = Stages()
        self.batches: dict[int, Batches] = {}
        self.last_inference_ms = 0
        self.recent = Recent()

    @property
    def images(self) -> int:
        """Images answered."""
        return sum(batch.images for batch in self.batches.values())

    @property
    def executions(self) -> int:
        """Forward passes behind them."""
        return sum(batch.executions(size) for size, batch in self.batches.items())

    def succeeded(self, milliseconds: float, timing: Timing, images: int = 1) -> None:
        """Count an answer of ``images`` images."""
        self.last_inference_ms = int(1e3 * time.time())
        self.success.add(milliseconds)
        self.recent.add("ok", milliseconds)
        self.stages.add(timing)
        batch = self.batches.setdefault(timing.batch_size, Batches())
        batch.images += images
        batch.stages.add(timing)

    def failed(self, milliseconds: float, code: str) -> None:
        """Count an error by its code."""
        self.fail.add(milliseconds)
        self.recent.add(code, milliseconds)


class Statistics:
    """The counters of every model that ``fleet`` serves."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._models: dict[str, ModelStatistics] = {}

    def of(self, model: str | None) -> ModelStatistics:
        """A model's counters, None being the primary one; those of a name that is not served are kept nowhere."""
        names = self._fleet.model_names()
        name = names[0] if model is None else model
        return self._models.setdefault(name, ModelStatistics()) if name in names else ModelStatistics()

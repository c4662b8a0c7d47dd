"""DetectionWorker: the same private model for whoever has a Ray Data pipeline already. No Ray in it.

    dataset.map_batches(DetectionWorker, batch_format="pyarrow", compute=ActorPoolStrategy(…))
        a column of bytes, or of URIs that are read here ─→ Detector ─→ the rows of OUTPUT, one an input

A bad input costs its own row: its ``error`` says why, and its result is null. Exactly once, resuming and setting aside what
kills an actor are not here but in ``yolofleet predict``.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from typing import Any

import pyarrow as pa

from actors.dataset import read_input
from actors.detector import Detector
from actors.errors import FleetError, ReplicaUnavailable
from actors.model import load_model
from actors.schemas import ImageResult, PredictParams
from actors.settings import ImageLimits, ModelSettings
from actors.startup import settled_model
from actors.writers import SCHEMA, row

OUTPUT = SCHEMA.append(pa.field("error", pa.string()))
"""``writers.SCHEMA`` and the reason why there is no result, null if there is one."""

PARAMS, LIMITS = PredictParams(), ImageLimits()


class DetectionWorker:
    """A callable class for ``map_batches``, with a model of its own in each actor.

    Args:
        model: which weights.
        params: thresholds.
        limits: what an image may weigh.
        uri: the column of URIs; what it holds is read unless there is a column of bytes.
        content: the column of encoded images, if the dataset has one.
        threads: of the engine; as many as the actor's ``num_cpus``.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: ModelSettings,
        params: PredictParams = PARAMS,
        limits: ImageLimits = LIMITS,
        *,
        uri: str = "uri",
        content: str | None = None,
        threads: int = 1,
    ) -> None:
        self._model, self._params = model, params
        self._uri, self._content = uri, content
        load = partial(load_model, model, threads)  # Ray Data has reserved, and shows the GPU or none
        self._detector = Detector(
            lambda: settled_model(model, load),
            limits,
            max_batch=model.max_batch,
            decode_threads=max(2, threads),
            reduced=model.decode == "reduced",
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Detect in one batch; a table of ``OUTPUT`` with its rows in their order."""
        uris = [str(uri) for uri in batch.column(self._uri).to_pylist()]
        contents = batch.column(self._content).to_pylist() if self._content else [None] * len(uris)
        started = [self._start(uri, content) for uri, content in zip(uris, contents, strict=True)]
        rows = [self._row(uri, *each) for uri, each in zip(uris, started, strict=True)]
        return pa.Table.from_pylist(rows, schema=OUTPUT)

    def _start(self, uri: str, content: bytes | None) -> tuple[str | None, Future[ImageResult]]:
        try:
            data = read_input(uri) if content is None else content
            return sha256(data).hexdigest(), self._detector.submit(data, self._params)
        except Exception as error:  # one input's failure is its own
            unread: Future[ImageResult] = Future()
            unread.set_exception(error)
            return None, unread

    def _row(self, uri: str, sha: str | None, detecting: Future[ImageResult]) -> dict[str, Any]:
        try:
            return row(uri, sha or "", self._model.name, detecting.result())
        except ReplicaUnavailable:  # the engine is dead: so is this worker, and Ray Data takes another
            raise
        except Exception as error:  # one input's failure is its own; its row says why
            reason = error.message if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"
            return {"uri": uri, "sha256": sha, "model": self._model.name, "error": reason}

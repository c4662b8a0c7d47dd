"""ModelReplica: the Serve shell of a Detector.

    handle.detect.remote(bytes, params) → Detector.submit → ImageResult

A replica counts as ready when its constructor returns, and the constructor returns after real inferences. Its health
check runs another tiny one on the model thread, so that a wedged engine is replaced and not only a dead process.
"""

import asyncio

import ray

from actors.detector import Detector
from actors.model import load_model
from actors.schemas import ImageResult, ModelInfo, PredictParams
from actors.settings import ImageLimits
from deploy.settings import ServedModel


class ModelReplica:
    """One private model behind a Serve handle.

    Args:
        model: the weights and the reservation of this replica.
        images: what an encoded image may weigh.
    """

    def __init__(self, model: ServedModel, images: ImageLimits) -> None:
        threads = model.actor.threads
        self._detector = Detector(
            lambda: load_model(model, threads), images, max_batch=model.max_batch, decode_threads=max(2, threads)
        )
        self._replica = ray.get_runtime_context().get_actor_id() or ""

    async def detect(self, data: bytes, params: PredictParams) -> tuple[ImageResult, str]:
        """Detect in one encoded image; also tell which replica answered.

        Raises:
            BadImage, BadRequest, EngineOutOfMemory: see ``Detector.submit``.
        """
        return await asyncio.wrap_future(self._detector.submit(data, params)), self._replica

    def describe(self) -> ModelInfo:
        """What this replica has loaded."""
        return self._detector.info

    async def check_health(self) -> None:
        """Called by Serve; raising replaces this replica."""
        await asyncio.to_thread(self._detector.check_health)

    def __del__(self) -> None:
        if hasattr(self, "_detector"):
            self._detector.close()

"""A model in its actor's share of the node: capped before it loads, refused where the share does not do.

    load_reserved ─→ claim the share ─→ load_model ─→ on a GPU: the largest batch, once ─→ need ≤ share? ─→ the model
                     no share: no GPU is seen                                              no: ModelError, with both

Ray only counts. Four actors of ``num_gpus: 0.25`` see the same GPU, and each could take all of its memory: what one takes too
much, another one lacks, later and somewhere else. So an actor caps itself and fails alone, at its start.

GPU     The share is ``num_gpus`` of the device's memory. torch's allocator is capped to it, and ONNX Runtime's arena; what
        TensorRT takes is fixed once it has loaded, and is counted. CUDA's own context and whatever else the driver counts for
        this process lie in the share too: torch's cap is lowered by them as soon as they are known.
CPU     The share is ``num_cpus`` of the cores' memory. The system has no cap that an engine survives; an actor beyond its
        share is refused where the node has no memory to spare, before Ray's monitor chooses somebody to kill at 95 %.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np

from actors import hardware
from actors.errors import EngineOutOfMemory, ModelError
from actors.model import Model, load_model
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ModelSettings

SCARCE = 0.1  # of a node's memory: with less to spare, nobody may have more than its share

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuShare:
    """What an actor may take of its GPU.

    Attributes:
        num_gpus: as it was reserved.
        total_bytes: memory of the device.
    """

    num_gpus: float
    total_bytes: int

    @property
    def bytes(self) -> int:
        """The share of the device that the model is on; of several whole ones it uses one."""
        return int(min(self.num_gpus, 1.0) * self.total_bytes)

    def __str__(self) -> str:
        return f"its share of the GPU, {_gb(self.bytes)} (num_gpus {self.num_gpus:g})"


def load_reserved(settings: ModelSettings, actor: ActorSettings, **how: Any) -> Model:
    """Load a model into what its actor has reserved; the calling thread becomes the model's owner.

    Args:
        settings: which weights.
        actor: what it has reserved.
        how: the engine, see ``load_model``.

    Raises:
        ModelError: it cannot be loaded, or needs more memory than its share.
    """
    share = _claim(actor)
    with _capped_sessions(share):
        model = _loaded(settings, actor, share, **how)
    if share and model.info.device.startswith("cuda"):
        if model.info.dynamic:  # what else takes is fixed when it has loaded
            _rehearse(model, settings.max_batch, share)
        _check_gpu(model, settings.max_batch, share)
    else:
        _check_memory(settings.name, actor)
    return model


def _claim(actor: ActorSettings) -> GpuShare | None:
    """Cap this process; None without a GPU, reserved or real: a cluster may pretend to have some."""
    if not actor.num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray itself hides them only if its nodes were started so
        return None
    devices = hardware.cuda_devices()
    if not devices:
        return None
    share = GpuShare(actor.num_gpus, devices[0].total_memory)
    hardware.cap_gpu_memory(share.bytes)
    return share


def _loaded(settings: ModelSettings, actor: ActorSettings, share: GpuShare | None, **how: Any) -> Model:
    try:
        return load_model(settings, actor.threads, **how)
    except ModelError as error:
        if share and hardware.is_out_of_memory(error.__cause__):
            raise ModelError(f"{settings.name} cannot even be loaded into {share}: give it a larger one") from error
        raise


def _rehearse(model: Model, max_batch: int, share: GpuShare) -> None:
    """Compute the largest batch that there may be. If it does not fit, find out for the message which one does."""
    grey = np.full((*model.info.imgsz, 3), 114, np.uint8)
    item = model.prepare(grey, PredictParams())
    size = max_batch
    while size:
        try:
            model.predict([item] * size)
        except EngineOutOfMemory:
            size //= 2
        else:
            break
    if size < max_batch:
        fits = f"a batch of {size} does: lower max_batch, or give it a larger share" if size else "give it a larger one"
        raise ModelError(f"{model.info.name} with a batch of {max_batch} does not fit into {share}: {fits}")


def _check_gpu(model: Model, max_batch: int, share: GpuShare) -> None:
    reserved, peak = hardware.gpu_memory_bytes() or 0, hardware.gpu_peak_bytes() or 0
    outside = max((hardware.gpu_process_bytes() or reserved) - reserved, 0)
    if peak + outside > share.bytes:
        beside = f", of which {_gb(outside)} are CUDA's own or the engine's" if outside else ""
        raise ModelError(
            f"{model.info.name} with a batch of {max_batch} needs {_gb(peak + outside)}{beside}, which is more than {share}:"
            " lower max_batch, or give it a larger share"
        )
    hardware.cap_gpu_memory(share.bytes - outside)
    log.info("%s needs %s of %s", model.info.name, _gb(peak + outside), share)


def _check_memory(name: str, actor: ActorSettings) -> None:
    total, spare = hardware.node_memory()
    taken, share = hardware.memory_bytes(), int(min(actor.num_cpus / hardware.available_cpus(), 1.0) * total)
    if not actor.num_cpus or taken <= share or spare >= SCARCE * total:  # who reserves nothing takes what is left
        return
    raise ModelError(
        f"{name} takes {_gb(taken)} of memory, more than its share of the node, {_gb(share)} (num_cpus {actor.num_cpus:g}),"
        f" and the node has {_gb(spare)} of {_gb(total)} left: fewer replicas or actors there, or more num_cpus for each"
    )


@contextmanager
def _capped_sessions(share: GpuShare | None) -> Iterator[None]:
    """Sessions of ONNX Runtime that are made inside take at most ``share`` of the GPU; Ultralytics has no argument for it."""
    if share is None or not find_spec("onnxruntime"):
        yield
        return
    import onnxruntime

    make_session = onnxruntime.InferenceSession

    def session(path: Any, options: Any = None, providers: Any = None, **rest: Any) -> Any:
        capped = providers and [_capped_provider(provider, share.bytes) for provider in providers]
        return make_session(path, options, providers=capped, **rest)

    with patch.object(onnxruntime, "InferenceSession", session):
        yield


def _capped_provider(provider: Any, limit: int) -> Any:
    name, options = provider if isinstance(provider, tuple) else (provider, {})
    return (name, {**options, "gpu_mem_limit": limit}) if name == "CUDAExecutionProvider" else provider


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

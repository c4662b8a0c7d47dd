"""A Detector on the engine that its settings ask for: at once, or on torch until that engine is made and checked.

    start_detector ─┬─ the engine is in the cache, and agrees ─→ Detector on it; the .pt is not loaded
                    └─ it is not ─→ Detector on torch … make, in another process … ─→ Detector.replace
    settled_detector ─ waits for the making first: a dataset job has one engine from its first image to its last

Whatever goes wrong with an engine costs speed and nothing else: torch answers, and ``ModelInfo.engine_reason`` and the log
say why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from actors.detector import Detector
from actors.engines import Plan, made, make, plan
from actors.errors import FleetError, ModelError
from actors.model import Model
from actors.reservation import load_reserved
from actors.schemas import ModelInfo
from actors.settings import ActorSettings, ImageLimits, ModelSettings

ALREADY = "the weights are an engine already"

log = logging.getLogger(__name__)

Load = Callable[..., Model]
"""``load_model`` or what does the same within a reservation, with the weights and threads given: only the engine is not."""


def start_detector(
    model: ModelSettings,
    actor: ActorSettings,
    limits: ImageLimits,
    on_replaced: Callable[[ModelInfo], None] = lambda info: None,
) -> Detector:
    """A Detector that answers at once, and on the planned engine as soon as that is to be had.

    Args:
        model: the weights and the engine.
        actor: what this process has reserved.
        limits: what an encoded image may weigh.
        on_replaced: called, in a thread of its own, when another engine answers.

    Raises:
        ModelError: the weights cannot be loaded, or the settings ask for what cannot be had here.
    """
    wanted = plan(model, gpu=actor.num_gpus > 0)
    if wanted is None or wanted.original or made(model, wanted):
        return settled_detector(model, actor, limits)
    load = partial(load_reserved, model, actor)
    waiting = f"until {wanted.engine} {wanted.precision} is made and checked"
    detector = _detector(lambda: load(why=waiting, settled=False), model, actor, limits)
    work = (detector, model, wanted, load, on_replaced)
    threading.Thread(target=_make_and_replace, args=work, name="engine", daemon=True).start()
    return detector


def settled_detector(model: ModelSettings, actor: ActorSettings, limits: ImageLimits) -> Detector:
    """A Detector whose engine stays what it is; see ``settled_model``."""
    load = partial(load_reserved, model, actor)
    return _detector(lambda: settled_model(model, load, gpu=actor.num_gpus > 0), model, actor, limits)


def settled_model(model: ModelSettings, load: Load, *, gpu: bool = True) -> Model:
    """The model on the planned engine, which is made first if it is not in the cache. The caller becomes its owner.

    Args:
        model: the weights and the engine.
        load: loads them on an engine.
        gpu: whether a GPU may be used, if there is one.

    Raises:
        ModelError: the weights cannot be loaded, or the settings ask for what cannot be had here.
    """
    wanted = plan(model, gpu=gpu)
    if wanted is None or wanted.original:
        return load(why=wanted.why if wanted else ALREADY)
    try:
        found = make(model, wanted)
        if not found.agrees:
            raise ModelError(found.verdict)
        return load(engine=found)
    except ModelError as error:
        return load(why=_refusal(wanted, error.message))


def _detector(load: Callable[[], Model], model: ModelSettings, actor: ActorSettings, limits: ImageLimits) -> Detector:
    threads, reduced = max(2, actor.threads), model.decode == "reduced"
    return Detector(load, limits, max_batch=model.max_batch, decode_threads=threads, reduced=reduced)


def _make_and_replace(
    detector: Detector, model: ModelSettings, wanted: Plan, load: Load, on_replaced: Callable[[ModelInfo], None]
) -> None:
    try:
        found = make(model, wanted, background=True)
        if not found.agrees:
            raise ModelError(found.verdict)
        detector.replace(lambda: load(engine=found))
    except FleetError as error:
        detector.explain(_refusal(wanted, error.message))
    except Exception:
        log.exception("%s goes on with torch: an unexpected error kept it from %s", model.name, wanted.engine)
        detector.explain(_refusal(wanted, "an unexpected error, which the log has"))
    else:
        on_replaced(detector.info)


def _refusal(wanted: Plan, reason: str) -> str:
    refusal = f"not {wanted.engine} {wanted.precision}: {reason}"
    log.warning("torch answers, and %s", refusal)
    return refusal

"""YoloModel: one private Ultralytics model, and the only importer of torch and ultralytics in the core.

                     any thread                                  the owner thread only
    image, params ─ prepare: letterbox ─→ Prepared ─┐
    image, params ─ prepare: letterbox ─→ Prepared ─┼─ predict: one forward pass, then per image: NMS, scaling ─→ ImageResult …
    image, params ─ prepare: letterbox ─→ Prepared ─┘   (all with the same ``bucket``)

The rule of the project lives here: a model belongs to the thread that loaded it, from load to death. Another thread, a
forked process and pickling all raise ``ModelOwnershipError``. Why: an Ultralytics predictor keeps the arguments of a call
in itself (``Model.predict`` writes ``predictor.args`` outside the predictor's lock), so that a shared one answers callers
with each other's thresholds.

Letterbox, forward pass, non-maximum suppression and scaling are Ultralytics' own code; what is ours is that a batch mixes
images with different thresholds: the pass is shared, then each image is post-processed alone with its own arguments. What
comes back for an image equals ``YOLO(weights).predict(image, **params)`` for that image alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, Protocol
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from actors.errors import BadRequest, EngineOutOfMemory, FleetError, ModelError, ModelOwnershipError
from actors.fake_model import FakeModel
from actors.schemas import TASKS, Detection, ImageResult, ModelInfo, Points, PredictParams, Timing
from actors.settings import ModelSettings

Array = NDArray[np.uint8]
Bucket = tuple[Any, ...]

END2END_CANDIDATES = 300  # ultralytics' predictor asks an end-to-end head for at least this many

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image on its way into a batch.

    Attributes:
        image: the original, (H, W, 3) uint8 BGR.
        inputs: the same letterboxed, (h, w, 3) uint8 BGR; the original itself for ``classify``.
        params: the thresholds of this image.
        bucket: images with equal buckets may share a forward pass.
    """

    image: Array
    inputs: Array
    params: PredictParams
    bucket: Bucket


class Model(Protocol):
    """What a Detector needs from a model; YoloModel is the real one, FakeModel its double."""

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""

    def prepare(self, image: Array, params: PredictParams) -> Any:
        """Letterbox ``image``. Safe in any thread."""

    def predict(self, batch: Sequence[Any]) -> list[ImageResult]:
        """One forward pass over a batch of one bucket. On the owner thread only."""


def load_model(settings: ModelSettings, threads: int) -> Model:
    """Load ``settings.weights``; the calling thread becomes the model's owner.

    Args:
        settings: which weights; ``fake:…`` makes the deterministic model for tests.
        threads: CPU threads of the engine; ignored on a GPU.

    Raises:
        ModelError: the weights are missing, of the wrong hash, or of a task that is not served.
    """
    if settings.weights.startswith("fake:"):
        return FakeModel(settings)
    return YoloModel(settings, threads)


class YoloModel:
    """A private YOLO model. Load, warm-up and every prediction happen on one thread of one process.

    Args:
        settings: which weights to load.
        threads: CPU threads of the engine.

    Raises:
        ModelError: the weights are missing, of the wrong hash, or of a task that is not served.
    """

    def __init__(self, settings: ModelSettings, threads: int = 1) -> None:
        self._owner = (os.getpid(), threading.get_ident())
        weights = Path(settings.weights)
        sha256 = hash_weights(weights)
        if settings.sha256 not in (None, sha256):
            raise ModelError(
                f"{weights} has SHA-256 {sha256}, but the settings pin {settings.sha256}: restore the file or the pin"
            )
        self._predictor = _load_predictor(weights, threads)
        backend = self._predictor.model
        self._channels_checked(backend)
        self._flexible = backend.format == "pt" or bool(getattr(backend, "dynamic", False))
        self._adjustable_head = backend.format == "pt" and bool(getattr(backend, "end2end", False))
        self._args = self._predictor.args
        self._imgsz = self._checked_imgsz(self._predictor.imgsz)
        self._info = ModelInfo(
            name=settings.name,
            weights=weights.name,
            sha256=sha256,
            task=self._args.task,
            names=dict(backend.names),
            imgsz=self._imgsz,
            engine={"pt": "torch", "engine": "tensorrt"}.get(backend.format, backend.format),
            device=str(self._predictor.device),
            versions=_versions(),
        )
        log.info("loaded %s: task %s, engine %s on %s", weights.name, *_words(self._info))

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""
        return self._info

    def prepare(self, image: Array, params: PredictParams) -> Prepared:
        """Letterbox one image as Ultralytics' predictor does for a single image. Safe in any thread.

        Args:
            image: (H, W, 3) uint8 BGR.
            params: its thresholds; ``imgsz`` decides the letterbox target.

        Raises:
            BadRequest: ``classes`` names ids that the model does not have, ``imgsz`` is not what a fixed export takes, or
                ``multi_label`` is asked of another task than ``detect``.
        """
        self._check_classes(params)
        if params.multi_label and self._info.task != "detect":
            raise BadRequest(f"'multi_label' is for detection models; this one is for '{self._info.task}': leave it out")
        imgsz = self._checked_imgsz(params.imgsz or self._imgsz)
        head = (max(params.max_det, END2END_CANDIDATES), params.agnostic_nms) if self._adjustable_head else ()
        if self._info.task == "classify":
            return Prepared(image, image, params, ("classify", imgsz))
        inputs = self._letterbox(imgsz, params.rect)(image=image)
        return Prepared(image, inputs, params, (inputs.shape, *head))

    def predict(self, batch: Sequence[Prepared]) -> list[ImageResult]:
        """Run one forward pass over images of one bucket, then post-process each with its own thresholds.

        Args:
            batch: at least one prepared image; all with the same ``bucket``.

        Returns:
            One result per image, in order; ``timing`` holds preprocess, inference and postprocess.

        Raises:
            ModelOwnershipError: called from another thread or process than the one that loaded the model.
            EngineOutOfMemory: the device cannot hold this batch.
        """
        self._check_owner()
        import torch

        with torch.inference_mode(), _translate_out_of_memory(len(batch)):
            return self._predict(batch)

    def _predict(self, batch: Sequence[Prepared]) -> list[ImageResult]:
        predictor = self._predictor
        started = time.perf_counter()
        if self._adjustable_head:
            max_det, agnostic = batch[0].bucket[1:]
            predictor.model.model.set_head_attr(max_det=max_det, agnostic_nms=agnostic)
        if self._info.task == "classify":
            predictor.args.imgsz = list(batch[0].bucket[1])
            predictor.setup_source([item.image for item in batch[:1]])  # sets the transforms for this size
        inputs = predictor.preprocess([item.inputs for item in batch])
        prepared = time.perf_counter()
        outputs = predictor.inference(inputs)
        inferred = time.perf_counter()
        preprocess = 1e3 * (prepared - started) / len(batch)
        inference = 1e3 * (inferred - prepared) / len(batch)
        results = []
        for index, item in enumerate(batch):
            begun = time.perf_counter()
            result = self._postprocess(_row(outputs, index), inputs[index : index + 1], item)
            postprocess = 1e3 * (time.perf_counter() - begun)
            timing = Timing(preprocess=preprocess, inference=inference, postprocess=postprocess, batch_size=len(batch))
            results.append(replace(result, timing=timing))
        return results

    def _postprocess(self, outputs: Any, inputs: Any, item: Prepared) -> ImageResult:
        predictor, params = self._predictor, item.params
        predictor.args = copy(self._args)
        predictor.args.conf = params.conf
        predictor.args.iou = params.iou
        predictor.args.classes = None if params.classes is None else list(params.classes)
        predictor.args.max_det = params.max_det
        predictor.args.agnostic_nms = params.agnostic_nms
        predictor.batch = ([""], None, None)  # a path per image, which Results wants and nobody reads
        if params.multi_label:
            (results,) = predictor.construct_results(_every_class(outputs, params), inputs, [item.image])
        else:
            (results,) = predictor.postprocess(outputs, inputs, [item.image])
        height, width = item.image.shape[:2]
        return ImageResult(width, height, self._info.task, _detections(results))

    def _letterbox(self, imgsz: tuple[int, int], rect: bool) -> Any:
        from ultralytics.data.augment import LetterBox

        # As BasePredictor.pre_transform does it for one image: a rectangle where the engine takes any shape.
        return LetterBox(imgsz, auto=self._flexible and rect, stride=self._predictor.model.stride)

    def _checked_imgsz(self, imgsz: Sequence[int]) -> tuple[int, int]:
        """Round sides up to the stride, as ``check_imgsz`` does; refuse another size than a fixed export has."""
        stride = int(self._predictor.model.stride)
        height, width = (max(-(-side // stride) * stride, stride) for side in imgsz)
        if not self._flexible and (height, width) != tuple(self._predictor.imgsz):
            fixed = list(self._predictor.imgsz)
            raise BadRequest(f"'imgsz' is {[height, width]}, but this model was exported for {fixed} only: leave it out")
        return height, width

    def _check_classes(self, params: PredictParams) -> None:
        unknown = [class_id for class_id in params.classes or () if class_id not in self._info.names]
        if unknown:
            raise BadRequest(f"'classes' has {unknown}, but this model knows the ids 0 to {len(self._info.names) - 1}")

    def _channels_checked(self, backend: Any) -> None:
        channels = getattr(backend, "channels", 3)
        if channels != 3:
            raise ModelError(f"The model takes images of {channels} channels; only 3 (colour) are served")

    def _check_owner(self) -> None:
        if (os.getpid(), threading.get_ident()) != self._owner:
            raise ModelOwnershipError(
                "This YoloModel belongs to the thread that loaded it: it keeps the arguments of a call in itself, so that"
                " another caller would get its answers. Load one model per worker, or submit to a Detector"
            )

    def __reduce__(self) -> NoReturn:
        raise ModelOwnershipError(
            "A YoloModel cannot be pickled or copied: send its ModelSettings and load a private one on the other side"
        )


def hash_weights(weights: Path) -> str:
    """SHA-256 over a weights file, or over the sorted files of an export folder (relative names and contents).

    Raises:
        ModelError: there is no such file or folder.
    """
    if not weights.exists():
        raise ModelError(f"No weights at {weights}: give the path of a file or folder that ultralytics.YOLO can load")
    if weights.is_file():
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in weights.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(weights)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_weights(name: str) -> Path | None:
    """Weights that Ultralytics knows by ``name``: here, in its weights folder, or by its own download; None if nowhere."""
    if Path(name).is_file():
        return Path(name)
    from ultralytics.utils import ONLINE, SETTINGS
    from ultralytics.utils.downloads import attempt_download_asset

    kept = Path(SETTINGS["weights_dir"]) / name
    if kept.is_file() or not ONLINE:
        return kept if kept.is_file() else None
    try:
        found = Path(attempt_download_asset(kept))
    except Exception as error:  # a firewall, a full disk: whatever it is, the weights are not to be had
        log.warning("%s could not be downloaded: %s", name, error)
        return None
    return found if found.is_file() else None


def _load_predictor(weights: Path, threads: int) -> Any:
    """An Ultralytics predictor, set up and used once, so that its arguments, device and transforms are final."""
    import torch
    import ultralytics
    from ultralytics.utils.events import events

    events.enabled = False  # no usage reports from a server
    ultralytics.utils.LOGGER.setLevel(logging.WARNING)
    try:
        with _engine_threads(threads):
            model = _used_once(weights, None)
            task = getattr(model.predictor.model, "task", None)
            if task and task != model.task:  # an export whose file name does not tell its task, but its metadata does
                model = _used_once(weights, task)
    except FleetError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"ultralytics.YOLO cannot load {weights}: {reason}") from error
    torch.set_num_threads(threads)  # last: select_device sets it to the machine's cores
    predictor: Any = model.predictor
    if model.task != "classify":
        predictor.pre_transform = lambda images: images  # letterboxed already, by prepare()
    return predictor


def _used_once(weights: Path, task: str | None) -> Any:
    """A YOLO object that has predicted once, which makes its predictor."""
    import ultralytics

    model = ultralytics.YOLO(str(weights), task=task)
    if model.task not in TASKS:
        raise ModelError(f"{weights} is a model for '{model.task}'; served are {', '.join(TASKS)}")
    model.predict(np.zeros((64, 64, 3), np.uint8), verbose=False, save=False)
    return model


@contextmanager
def _engine_threads(threads: int) -> Iterator[None]:
    """Make the runtimes that Ultralytics' backends start inside use ``threads`` CPU threads.

    The backends have no argument for it, so the constructors that they call are replaced while a model loads. OpenVINO's
    pinning is off: every one-thread process would pin itself to the first core.
    """
    with ExitStack() as patches:
        if find_spec("openvino"):
            import openvino

            make_core = openvino.Core

            def core(*args: Any) -> Any:
                made = make_core(*args)
                made.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False})
                return made

            patches.enter_context(patch.object(openvino, "Core", core))
        if find_spec("onnxruntime"):
            import onnxruntime

            make_session = onnxruntime.InferenceSession

            def session(path: str, options: Any = None, **rest: Any) -> Any:
                options = options or onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                return make_session(path, options, **rest)

            patches.enter_context(patch.object(onnxruntime, "InferenceSession", session))
        yield


def _versions() -> dict[str, str]:
    """Versions that decide the answers, under the keys that Ultralytics' own API has for them."""
    import torch
    import ultralytics

    return {
        "yolofleet": version("yolofleet"),
        "ultralytics": ultralytics.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _row(outputs: Any, index: int) -> Any:
    """Image ``index`` of a batch's raw outputs, with a batch dimension of 1; training-only dictionaries are left out."""
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_row(part, index) for part in outputs if not isinstance(part, dict))
    return outputs[index : index + 1]


def _every_class(outputs: Any, params: PredictParams) -> list[Any]:
    """Non-maximum suppression as ``DetectionValidator.postprocess`` calls it."""
    from ultralytics.utils.nms import non_max_suppression

    suppressed: list[Any] = non_max_suppression(
        outputs,
        params.conf,
        params.iou,
        params.classes,
        params.agnostic_nms,
        multi_label=True,
        max_det=params.max_det,
    )
    return suppressed


def _detections(results: Any) -> tuple[Detection, ...]:
    """Ultralytics' ``Results`` of one image as plain values; the same numbers that ``Results.summary()`` gives."""
    if results.probs is not None:
        top5 = zip(results.probs.top5, results.probs.top5conf.tolist(), strict=True)
        return tuple(Detection(int(class_id), results.names[int(class_id)], conf) for class_id, conf in top5)
    oriented = results.obb is not None
    rows = (results.obb if oriented else results.boxes).cpu()
    corners = rows.xyxyxyxy.tolist() if oriented else [None] * len(rows)
    boxes = [None] * len(rows) if oriented else [tuple(box) for box in rows.xyxy.tolist()]
    outlines = [_points(outline) for outline in results.masks.xy] if results.masks else [None] * len(rows)
    poses = [] if results.keypoints is None else results.keypoints.data.cpu().numpy()
    skeletons = [_points(pose) for pose in poses] if len(poses) else [None] * len(rows)
    return tuple(
        Detection(
            class_id=int(class_id),
            name=results.names[int(class_id)],
            confidence=confidence,
            box=box,
            corners=_points(np.array(corner)) if oriented else None,
            segments=outline,
            keypoints=skeleton,
        )
        for class_id, confidence, box, corner, outline, skeleton in zip(
            rows.cls.tolist(), rows.conf.tolist(), boxes, corners, outlines, skeletons, strict=True
        )
    )


def _points(points: Any) -> Points:
    columns = [tuple(column) for column in np.asarray(points, dtype=float).T.tolist()]
    return Points(*columns) if columns else Points((), ())


@contextmanager
def _translate_out_of_memory(batch_size: int) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise EngineOutOfMemory(f"The GPU has no memory left for a batch of {batch_size}: lower max_batch") from error


def _words(info: ModelInfo) -> tuple[str, str, str]:
    return info.task, info.engine, info.device

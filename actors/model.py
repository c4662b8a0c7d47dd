"""YoloModel: one private Ultralytics model.

                     any thread                                  the owner thread only
    image, params ─ prepare: letterbox ─→ Prepared ─┐
    image, params ─ prepare: letterbox ─→ Prepared ─┼─ predict: one forward pass, then per image: NMS, scaling ─→ ImageResult …
    image, params ─ prepare: letterbox ─→ Prepared ─┘   (all with the same ``bucket``)
                                                        or, where an engine is ``one_by_one``, each: a pass an image

The rule of the project lives here: a model belongs to the thread that loaded it, from load to death. Another thread, a
forked process and pickling all raise ``ModelOwnershipError``. Why: an Ultralytics predictor keeps the arguments of a call
in itself (``Model.predict`` writes ``predictor.args`` outside the predictor's lock), so that a shared one answers callers
with each other's thresholds.

Letterbox, forward pass, non-maximum suppression and scaling are Ultralytics' own code; what is ours is that a batch mixes
images with different thresholds: the pass is shared, then each image is post-processed alone with its own arguments. What
comes back for an image equals ``YOLO(weights).predict(image, **params)`` for that image alone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.engines import Made
from actors.errors import BadRequest, EngineOutOfMemory, ModelError, ModelOwnershipError
from actors.fake_model import FakeModel
from actors.images import as_tensor
from actors.predictor import exported_imgsz, load_predictor, precision_of, streams_of, versions
from actors.schemas import MAX_IMGSZ, Detection, ImageResult, ModelInfo, Points, PredictParams, Timing
from actors.settings import ModelSettings
from actors.weights import hash_weights

Array = NDArray[np.uint8]
Bucket = tuple[Any, ...]
Key = TypeVar("Key")

END2END_CANDIDATES = 300  # ultralytics' predictor asks an end-to-end head for at least this many

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image on its way into a batch.

    Attributes:
        shape: (H, W, 3) of the original; its pixels are not kept.
        inputs: the image letterboxed, (h, w, 3) uint8 BGR; as it is for ``classify``.
        params: the thresholds of this image.
        bucket: images with equal buckets may share a forward pass.
    """

    shape: tuple[int, ...]
    inputs: Array
    params: PredictParams
    bucket: Bucket


class Model(Protocol):
    """What a Detector needs from a model; YoloModel is the real one, FakeModel its double."""

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""

    @property
    def one_by_one(self) -> bool:
        """Whether the engine computes each image by itself, and is kept at work by ``each`` with whatever comes."""

    def prepare(self, image: Array, params: PredictParams, shape: tuple[int, ...] | None = None) -> Any:
        """Letterbox ``image``, a reduced copy of one of ``shape``. Safe in any thread."""

    def predict(self, batch: Sequence[Any]) -> list[ImageResult]:
        """One forward pass over a batch of one bucket. On the owner thread only."""

    def each(self, take: Callable[[], tuple[Key, Any] | None]) -> Iterator[tuple[Key, ImageResult]]:
        """Image by image, as they come and as they are done. On the owner thread only."""

    def infer(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """One forward pass over (N, 3, H, W) RGB from 0 to 1. On the owner thread only."""


def load_model(
    settings: ModelSettings, threads: int, engine: Made | None = None, *, why: str = "", settled: bool = True
) -> Model:
    """Load ``settings.weights``; the calling thread becomes the model's owner.

    Args:
        settings: which weights; ``fake:…`` makes the deterministic model for tests.
        threads: CPU threads of the engine; ignored on a GPU.
        engine: what was made of the weights, to be loaded in their place.
        why: the reason for this engine, where ``engine`` does not tell it.
        settled: whether another engine is not going to replace it.

    Raises:
        ModelError: the weights are missing, of the wrong hash, or of a task that is not served.
    """
    if settings.weights.startswith("fake:"):
        return FakeModel(settings)
    return YoloModel(settings, threads, engine, why=why, settled=settled)


class YoloModel:
    """A private YOLO model. Load, warm-up and every prediction happen on one thread of one process.

    Args:
        settings: which weights to load.
        threads: CPU threads of the engine.
        engine: what was made of the weights; the weights themselves are then hashed, and not loaded.
        why: the reason for this engine, where ``engine`` does not tell it.
        settled: whether another engine is not going to replace it.

    Raises:
        ModelError: the weights are missing, of the wrong hash, or of a task that is not served.
    """

    def __init__(
        self, settings: ModelSettings, threads: int = 1, engine: Made | None = None, *, why: str = "", settled: bool = True
    ) -> None:
        self._owner = (os.getpid(), threading.get_ident())
        weights = Path(settings.weights)
        sha256 = hash_weights(weights)
        if settings.sha256 not in (None, sha256):
            raise ModelError(
                f"{weights} has SHA-256 {sha256}, but the settings pin {settings.sha256}: restore the file or the pin"
            )
        self._predictor = _predictor_of(weights, threads, engine)
        backend = self._predictor.model
        self._channels_checked(backend)
        self._flexible = backend.format == "pt" or bool(getattr(backend, "dynamic", False))
        self._adjustable_head = backend.format == "pt" and bool(getattr(backend, "end2end", False))
        self._args = self._predictor.args
        self._streams = None if self._args.task == "classify" else streams_of(backend)
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
            versions=versions(),
            stride=int(backend.stride),
            dynamic=self._flexible,
            end2end=bool(getattr(backend, "end2end", False)),
            kpt_shape=tuple(backend.kpt_shape) if self._args.task == "pose" else None,
            precision=precision_of(backend),
            engine_reason=engine.reason if engine else why,
            settled=settled,
        )
        self._info = replace(self._info, output_shapes=self._output_shapes())
        log.info("loaded %s: task %s, engine %s on %s", weights.name, *_words(self._info))

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""
        return self._info

    @property
    def adjustable_head(self) -> bool:
        """Whether the head takes ``max_det`` and ``agnostic_nms`` from each call, as end-to-end ``.pt`` weights do."""
        return self._adjustable_head

    @property
    def one_by_one(self) -> bool:
        """Whether the engine computes each image by itself, so that no image waits for others of its shape."""
        return self._streams is not None

    def prepare(self, image: Array, params: PredictParams, shape: tuple[int, ...] | None = None) -> Prepared:
        """Letterbox one image as Ultralytics' predictor does for a single image. Safe in any thread.

        Args:
            image: (H, W, 3) uint8 BGR.
            params: its thresholds; ``imgsz`` decides the letterbox target.
            shape: (H, W, 3) in whose pixels the result is to be, if ``image`` is a smaller copy.

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
            return Prepared(shape or image.shape, image, params, ("classify", imgsz))
        inputs = self._letterbox(imgsz, params.rect)(image=image)
        return Prepared(shape or image.shape, inputs, params, () if self.one_by_one else (inputs.shape, *head))

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

        if self.one_by_one:
            waiting = deque(enumerate(batch))
            found = dict(self.each(lambda: waiting.popleft() if waiting else None))
            return [_in_batch(found[index], len(batch)) for index in range(len(batch))]
        with torch.inference_mode(), _translate_out_of_memory(len(batch)):
            return self._predict(batch)

    def each(self, take: Callable[[], tuple[Key, Prepared] | None]) -> Iterator[tuple[Key, ImageResult]]:
        """Compute image by image, as long as there are any: with others going on, one is post-processed.

        Args:
            take: gives the next prepared image, and what it is known by; None while there is none. Called on this thread
                whenever the engine has room.

        Yields:
            What the image is known by, and its result, in the order in which they are done.

        Raises:
            ModelOwnershipError: called from another thread or process than the one that loaded the model.
            RuntimeError: the engine has failed for one of those that it had, or is not ``one_by_one``.
        """
        self._check_owner()
        import torch

        if self._streams is None:
            raise RuntimeError(f"{self._info.engine} computes batches")

        def inputs() -> tuple[tuple[Key, Prepared, Any, float], NDArray[np.float32]] | None:
            if (taken := take()) is None:
                return None
            begun = time.perf_counter()
            tensor = as_tensor([taken[1].inputs])
            return (*taken, torch.from_numpy(tensor), 1e3 * (time.perf_counter() - begun)), tensor

        for (key, item, tensor, preprocess), arrays, inference in self._streams.each(inputs):
            begun = time.perf_counter()
            with torch.inference_mode(), self._threads_of_post():
                outputs = [torch.from_numpy(array) for array in arrays]
                result = self._postprocess(outputs[0] if len(outputs) == 1 else outputs, tensor, item)
            timing = Timing(preprocess=preprocess, inference=inference, postprocess=1e3 * (time.perf_counter() - begun))
            yield key, replace(result, timing=timing)

    def infer(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """Run the engine alone: no letterbox, no suppression. What Ultralytics' remote backends ask for.

        Args:
            inputs: (N, 3, H, W) float32 RGB from 0 to 1.

        Returns:
            The engine's output arrays in its own order, float32.

        Raises:
            BadRequest: a shape that this engine does not take.
            ModelOwnershipError: called from another thread or process than the one that loaded the model.
            EngineOutOfMemory: the device cannot hold this batch.
        """
        self._check_owner()
        import torch

        self._check_tensor(inputs.shape)
        with torch.inference_mode(), _translate_out_of_memory(len(inputs)):
            backend = self._predictor.model
            if self._adjustable_head:  # a batch before this may have asked it for another number
                backend.model.set_head_attr(max_det=END2END_CANDIDATES, agnostic_nms=False)
            tensor = torch.from_numpy(np.require(inputs, requirements=["C", "W"])).to(self._predictor.device)
            outputs = tuple(_arrays(backend(tensor.half() if backend.fp16 else tensor)))
            return outputs[:1] if self._info.task == "classify" else outputs  # torch adds the logits, an export does not

    def _output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the raw outputs, -1 where they differ between two sizes of the input."""
        unit = max(self._info.stride, 32)  # an exported classifier says 1
        sizes = ((2 * unit, 2 * unit), (4 * unit, 3 * unit)) if self._flexible else (self._imgsz,)
        first, *others = ([out.shape for out in self.infer(np.zeros((1, 3, *size), np.float32))] for size in sizes)
        for other in others:
            first = [_where_equal(one, two) for one, two in zip(first, other, strict=True)]
        return tuple((-1, *shape[1:]) for shape in first)

    def _check_tensor(self, shape: tuple[int, ...]) -> None:
        stride = int(self._predictor.model.stride)
        if len(shape) != 4 or shape[1] != 3 or not shape[0]:
            raise BadRequest(f"The tensor's shape is {list(shape)}: send [batch, 3, height, width]")
        batch, _, height, width = shape
        if not self._flexible and (height, width) != self._imgsz:
            raise BadRequest(f"The tensor is {height}x{width}, but this model was exported for {list(self._imgsz)} only")
        if self._info.task != "classify" and (height % stride or width % stride or not height or not width):
            raise BadRequest(f"The tensor is {height}x{width}: both sides have to be multiples of {stride}")
        if self._info.engine == "tensorrt" and self._flexible and batch > self._predictor.model.batch:
            raise BadRequest(f"The tensor has {batch} images: the engine was made for {self._predictor.model.batch} at once")
        if max(height, width) > MAX_IMGSZ:
            raise BadRequest(f"The tensor is {height}x{width}: at most {MAX_IMGSZ} a side are accepted")

    def _predict(self, batch: Sequence[Prepared]) -> list[ImageResult]:
        predictor = self._predictor
        started = time.perf_counter()
        if self._adjustable_head:
            max_det, agnostic = batch[0].bucket[1:]
            predictor.model.model.set_head_attr(max_det=max_det, agnostic_nms=agnostic)
        if self._info.task == "classify":
            predictor.args.imgsz = list(batch[0].bucket[1])
            predictor.setup_source([item.inputs for item in batch[:1]])  # sets the transforms for this size
        inputs = self._tensor([item.inputs for item in batch])
        prepared = time.perf_counter()
        outputs = predictor.inference(inputs)
        inferred = time.perf_counter()
        preprocess = 1e3 * (prepared - started) / len(batch)
        inference = 1e3 * (inferred - prepared) / len(batch)
        results = []
        with self._threads_of_post():
            for index, item in enumerate(batch):
                begun = time.perf_counter()
                result = self._postprocess(_row(outputs, index), inputs[index : index + 1], item)
                postprocess = 1e3 * (time.perf_counter() - begun)
                timing = Timing(preprocess=preprocess, inference=inference, postprocess=postprocess, batch_size=len(batch))
                results.append(replace(result, timing=timing))
        return results

    def _threads_of_post(self) -> AbstractContextManager[None]:
        return nullcontext() if self._info.task == "segment" else _one_thread()  # masks are large

    def _tensor(self, images: list[Array]) -> Any:
        """The engine's input for letterboxed images; Ultralytics' own way where it is on a GPU, or crops for ``classify``."""
        import torch

        if self._info.task == "classify" or self._predictor.device.type != "cpu":
            return self._predictor.preprocess(images)
        return torch.from_numpy(as_tensor(images))

    def _postprocess(self, outputs: Any, inputs: Any, item: Prepared) -> ImageResult:
        predictor, params = self._predictor, item.params
        predictor.args = copy(self._args)
        predictor.args.conf = params.conf
        predictor.args.iou = params.iou
        predictor.args.classes = None if params.classes is None else list(params.classes)
        predictor.args.max_det = params.max_det
        predictor.args.agnostic_nms = params.agnostic_nms
        predictor.batch = ([""], None, None)  # a path per image, which Results wants and nobody reads
        original = np.broadcast_to(np.uint8(0), item.shape)  # Results wants an image and reads its shape only
        if params.multi_label:
            (results,) = predictor.construct_results(_every_class(outputs, params), inputs, [original])
        else:
            (results,) = predictor.postprocess(outputs, inputs, [original])
        height, width = item.shape[:2]
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


def _predictor_of(weights: Path, threads: int, engine: Made | None) -> Any:
    if engine is None:
        return load_predictor(weights, threads)
    if engine.path is None:  # torch itself, computing in another precision
        return load_predictor(weights, threads, quantize={"fp16": 16}.get(engine.plan.precision))
    return load_predictor(engine.path, threads, imgsz=exported_imgsz(engine.path))


def _in_batch(result: ImageResult, size: int) -> ImageResult:
    return replace(result, timing=replace(result.timing, batch_size=size))


def _row(outputs: Any, index: int) -> Any:
    """Image ``index`` of a batch's raw outputs, with a batch dimension of 1; training-only dictionaries are left out."""
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_row(part, index) for part in outputs if not isinstance(part, dict))
    return outputs[index : index + 1]


def _arrays(outputs: Any) -> Iterator[NDArray[np.float32]]:
    """The tensors of a raw output as arrays; training-only dictionaries are left out."""
    if isinstance(outputs, (list, tuple)):
        for part in outputs:
            yield from _arrays(part)
    elif not isinstance(outputs, dict):
        yield np.asarray(outputs.cpu().numpy() if hasattr(outputs, "cpu") else outputs, np.float32)


def _where_equal(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a if a == b else -1 for a, b in zip(one, other, strict=True))


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
def _one_thread() -> Iterator[None]:
    """Torch on one CPU thread: what follows a forward pass is so small that waking the others takes longer than the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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

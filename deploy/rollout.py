"""``yolofleet deploy``: other settings on a running fleet without a failed request; other weights only if they prove good.

    CONFIG → Release ─ nothing runs yet ─→ started
                     └ else, for every model with other weights or another engine:
                          recent real requests ─┬→ the running replicas ┐
                                                └→ a candidate replica  ┴→ agreement, latency ─ too bad ─→ nothing is changed
                       then traffic moves:  models  →  ingress  →  what nobody needs any more

A candidate is one replica in an application of its own without a route; it is gone before traffic moves. Models change
before the ingress and vanish after it, so that whoever is asked for a model has it, and so that a new ingress never keeps
what an old model has told of itself. Every replacement is up before what it replaces goes (``max_surge_percent``), and that
goes when it has answered what it had in hand.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import ApplicationStatus
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actors.errors import FleetError
from actors.images import encode_jpeg
from actors.schemas import Answer, ModelInfo, PredictParams
from deploy.agreement import Agreement, agreement, milliseconds, percentiles, refused, total
from deploy.app import app_of, model_app, models_of
from deploy.config import HttpOptions
from deploy.demo.scene import draw_scene
from deploy.launch import LaunchError, run, start_app, stop
from deploy.release import INGRESS, Deployed, Release
from deploy.settings import APP_NAME, AppSettings, Replicas, RolloutRules, ServedModel

CANDIDATE = f"{APP_NAME}-candidate"
LOCK = f"{APP_NAME}-rollout"
DRAWN_SCENES = 8  # where nobody has asked a model anything yet
TRIES_PER_INGRESS = 4
ANSWER_TIMEOUT_S = 60.0
ROOM_PATIENCE_S = 3.0  # in which Ray learns what has just been given back
ENGINE_POLL_S = 1.0

Say = Callable[[str], None]
Request = tuple[bytes, PredictParams]


class RolloutRefused(FleetError):
    """The new settings do not run and the old ones still do: nothing has changed for any client."""

    status = 409
    code = "rollout_refused"


@dataclass(frozen=True)
class Comparison:
    """The old and the new version of a model on the same images.

    Attributes:
        model: its name.
        old_sha256: of the running weights, hexadecimal.
        new_sha256: of the candidate's.
        images: that both were asked for.
        drawn: whether these are drawn scenes, for want of recent requests.
        errors: images that the new version answers with an error.
        found: objects and how many are the same.
        old_ms: median and 95th percentile of the old one's time in the replica, milliseconds. It serves its users meanwhile.
        new_ms: those of the new one.
        objection: why traffic should not move, in a sentence; None if it may.
    """

    model: str
    old_sha256: str
    new_sha256: str
    images: int
    drawn: bool
    errors: int
    found: Agreement
    old_ms: tuple[float, float]
    new_ms: tuple[float, float]
    objection: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"agreement": self.found.share}


@dataclass(frozen=True)
class Report:
    """What a rollout has come to.

    Attributes:
        comparisons: one for every model with other weights or another engine.
        moved: whether the new settings run.
        forced: whether objections were overruled.
        reason: why they do not run, in a sentence; None if they do.
    """

    comparisons: tuple[Comparison, ...] = ()
    moved: bool = True
    forced: bool = False
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"comparisons": [comparison.as_dict() for comparison in self.comparisons]}


def rollout(settings: AppSettings, http: HttpOptions, say: Say, *, force: bool = False) -> Report:
    """Let ``settings`` run on the cluster that this process has joined.

    Args:
        settings: what shall run; their ``rollout`` decides when.
        http: where to listen if nothing runs yet.
        say: tells the user how far it is.
        force: move traffic whatever the comparison says.

    Raises:
        LaunchError: what runs cannot be asked, or nothing runs and the settings cannot be started.
    """
    with rollouts_locked():
        running = _running()
        if running is None:
            say(f"nothing runs yet: starting {_names(settings.models)}")
            say(f"ready: {start_app(settings, http.host, http.port)}")
            return Report()
        new = Release.of(settings)
        comparisons: list[Comparison] = []
        try:
            if running.settings.auth.keys_file and not settings.auth.keys_file and not force:
                raise RolloutRefused(
                    "The running fleet asks for API keys and the config names none: give 'auth: {keys_file: …}', or --force"
                )
            _check_room(running, new)
            for model in new.other_answers(running):
                say(f"{model.name}: a candidate loads {model.weights} beside the running replicas")
                with _candidate(new, model) as candidate:
                    comparisons.append(_compare(model.name, candidate, settings.rollout))
            objections = [comparison.objection for comparison in comparisons if comparison.objection]
            if objections and not force:
                raise RolloutRefused(" ".join(objections))
            _move(running, new, say)
        except RolloutRefused as error:
            return Report(tuple(comparisons), moved=False, reason=error.message)
        return Report(tuple(comparisons), forced=force and bool(objections))


def render(report: Report) -> Table:
    """The comparisons as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("model\nold → new weights", no_wrap=True)
    for heading in ("images", "objects\nold / new / same", "agree-\nment", "p50 ms\nold → new", "p95 ms\nold → new"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in report.comparisons:
        table.add_row(
            f"{one.model} {one.old_sha256[:8]} → {one.new_sha256[:8]}",
            f"{one.images}{' drawn' if one.drawn else ''}",
            f"{one.found.old} / {one.found.new} / {one.found.matched}",
            f"[{'red' if one.objection else 'green'}]{one.found.share:.3f}[/]",
            *(f"{old:.1f} → {new:.1f}" for old, new in zip(one.old_ms, one.new_ms, strict=True)),
        )
    if any(one.drawn for one in report.comparisons):
        table.caption = "drawn: nobody has asked this model anything yet, so scenes of deploy/demo/scene.py were compared"
    return table


# ---- what runs


def _running() -> Release | None:
    """What the running application was started with; None if there is none."""
    application = serve.status().applications.get(APP_NAME)
    if application is None or application.status is ApplicationStatus.NOT_STARTED:
        return None
    if application.status in (ApplicationStatus.DEPLOYING, ApplicationStatus.DELETING):
        raise LaunchError(f"The application is {application.status.value} at present: try again when it is not")
    if application.status is ApplicationStatus.DEPLOY_FAILED and not _ingress_runs():
        return None
    release: Release = _asked(serve.get_app_handle(APP_NAME).release.remote())
    return release


def _ingress_runs() -> bool:
    ingress = serve.status().applications[APP_NAME].deployments.get(INGRESS)
    return ingress is not None and ingress.replica_states.get("RUNNING", 0) > 0


@contextmanager
def rollouts_locked() -> Iterator[None]:
    """Refuse a second rollout at the same time; the lock is an actor that dies with this process."""
    holder = ray.remote(_Lock).options(name=LOCK, namespace=LOCK, num_cpus=0)
    try:
        lock = holder.remote()
    except ValueError as error:
        raise LaunchError("Another 'yolofleet deploy' is under way on this cluster: wait until it has ended") from error
    try:
        if CANDIDATE in serve.status().applications:
            stop(CANDIDATE)  # of a rollout that was killed
        yield
    finally:
        ray.kill(lock)


class _Lock:
    """Holds a name."""


# ---- room


def _check_room(running: Release, new: Release) -> None:
    """Refuse at once what would wait without end for CPUs or GPUs; on a cluster of several nodes more may come.

    Room is needed for what is new, for what grows, and once for the largest replica that replaces another.
    """
    if len(ray.nodes()) > 1:
        return
    needed = _needed(running.deployments(), new.deployments())
    give_up = time.monotonic() + ROOM_PATIENCE_S
    while missing := _missing(needed):
        if time.monotonic() > give_up:
            raise RolloutRefused(
                f"There is no room for new replicas beside the old ones: {' and '.join(missing)} more are needed."
                " Lower 'actor' or 'replicas' of a model, or give Ray more"
            )
        time.sleep(0.2)


def _needed(before: dict[str, Deployed], after: dict[str, Deployed]) -> dict[str, float]:
    """CPUs and GPUs that must be free."""
    needed = {}
    for resource in ("CPU", "GPU"):
        field = f"num_{resource.lower()}s"
        growth, largest = 0.0, 0.0
        for name, deployed in after.items():
            each, old = getattr(deployed.actor, field), before.get(name)
            growth += max(0.0, deployed.count * each - (old.count * getattr(old.actor, field) if old else 0))
            if old and old.version != deployed.version:
                largest = max(largest, each)
        needed[resource] = growth + largest
    return needed


def _missing(needed: dict[str, float]) -> list[str]:
    free = ray.available_resources()
    short = {resource: count - free.get(resource, 0.0) for resource, count in needed.items()}
    return [f"{count:g} {resource}s" for resource, count in short.items() if count > 1e-6]


# ---- comparison


@contextmanager
def _candidate(new: Release, model: ServedModel) -> Iterator[DeploymentHandle]:
    """One replica of ``model`` that no client reaches; gone afterwards.

    Raises:
        RolloutRefused: it cannot be loaded.
    """
    single = model.model_copy(update={"replicas": Replicas()})
    try:
        candidate = model_app(new, single, graceful_shutdown_wait_loop_s=0.1, max_constructor_retry_count=1)
        run(candidate, CANDIDATE, None, new.settings.rollout.ready_timeout_s)
        yield serve.get_app_handle(CANDIDATE)
    except LaunchError as error:
        raise RolloutRefused(f"The new '{model.name}' cannot be served. {error.message}") from error
    finally:
        stop(CANDIDATE)


def _compare(model: str, candidate: DeploymentHandle, rules: RolloutRules) -> Comparison:
    """Ask both for the same images, one after the other."""
    running = serve.get_app_handle(APP_NAME)
    old_info: ModelInfo = _asked(running.describe.remote(model))
    new_info = _settled(candidate, rules.ready_timeout_s)
    requests = _recent(running, model, rules.replay)
    drawn = not requests
    agreements, old_ms, new_ms = [], [], []
    errors = 0
    for image, params in requests or _drawn():
        try:
            old: Answer = _asked(running.replay.remote(model, image, params, ANSWER_TIMEOUT_S))
        except LaunchError:
            raise
        except FleetError:  # it was answered once and is not any more: nothing to compare with
            continue
        old_ms.append(milliseconds(old.result.timing))
        try:
            new: Answer = _asked(candidate.detect.remote(image, params, ANSWER_TIMEOUT_S))
        except FleetError:
            errors += 1
            agreements.append(refused(old.result))
        else:
            new_ms.append(milliseconds(new.result.timing))
            agreements.append(agreement(old.result, new.result))
    found, old_times, new_times = total(agreements), percentiles(old_ms or [0.0]), percentiles(new_ms or [0.0])
    slowdown = new_times[0] / max(old_times[0], 1e-3)
    return Comparison(
        model=model,
        old_sha256=old_info.sha256,
        new_sha256=new_info.sha256,
        images=len(agreements),
        drawn=drawn,
        errors=errors,
        found=found,
        old_ms=old_times,
        new_ms=new_times,
        objection=_objection(model, found, len(agreements), errors, slowdown, rules),
    )


def _settled(candidate: DeploymentHandle, timeout_s: float) -> ModelInfo:
    """What the new one is, when it computes with the engine that it will serve with: the first may be a slower one."""
    give_up = time.monotonic() + timeout_s
    while True:
        info: ModelInfo = _asked(candidate.describe.remote())
        if info.settled or time.monotonic() > give_up:
            return info
        time.sleep(ENGINE_POLL_S)


def _objection(model: str, found: Agreement, images: int, errors: int, slowdown: float, rules: RolloutRules) -> str | None:
    if not images:
        return (
            f"The new '{model}' could not be compared, as the running one answers none of the images any more:"
            " see the server's log, or give --force."
        )
    if found.share < rules.min_agreement:
        failed = f" and fails on {errors} images" if errors else ""
        return (
            f"The new '{model}' agrees with the running one on {found.share:.3f} of the objects{failed},"
            f" {rules.min_agreement:g} is asked for: mend it, lower --min-agreement, or give --force."
        )
    if rules.max_slowdown is not None and slowdown > rules.max_slowdown:
        return (
            f"The new '{model}' takes {slowdown:.2f} times as long as the running one,"
            f" {rules.max_slowdown:g} is allowed: raise --max-slowdown, or give --force."
        )
    return None


def _recent(running: DeploymentHandle, model: str, count: int) -> list[Request]:
    """The latest requests of all ingresses that can be met, equal shares of each.

    Serve decides which ingress is asked. Its ``broadcast`` would reach all, but in Ray 2.60 the driver that gets more than
    some 100 kB from it dies when the answer is freed ("ObjectUnknownOwner").
    """
    ingresses = serve.status().applications[APP_NAME].deployments[INGRESS].replica_states.get("RUNNING", 1)
    remembered: dict[str, list[Request]] = {}
    for _ in range(TRIES_PER_INGRESS * ingresses):
        whose, requests = _asked(running.recent.remote(model))
        remembered[whose] = requests
        if len(remembered) >= ingresses:
            break
    newest_first = [reversed(requests) for requests in remembered.values()]
    return list(islice(_alternate(newest_first), count))


def _alternate(many: Sequence[Iterator[Request]]) -> Iterator[Request]:
    """One of each in turn, until all are at their end."""
    left = list(many)
    while left:
        for one in list(left):
            try:
                yield next(one)
            except StopIteration:
                left.remove(one)


def _drawn() -> Iterator[Request]:
    for seed in range(DRAWN_SCENES):
        yield encode_jpeg(draw_scene(seed).image), PredictParams()


def _asked(response: DeploymentResponse) -> Any:
    """A replica's answer. Its own expected errors come as they are, whatever Ray and Serve say as LaunchError."""
    try:
        return response.result(timeout_s=ANSWER_TIMEOUT_S)
    except RayTaskError as error:
        if isinstance(error.cause, FleetError):
            raise error.cause from None
        raise
    except (RayError, RayServeException, TimeoutError) as error:
        raise LaunchError(f"A replica did not answer: {str(error).splitlines()[0] if str(error) else 'time-out'}") from error


# ---- moving traffic


def _move(running: Release, new: Release, say: Say) -> None:
    """Replace what is to be replaced, in an order in which nobody is ever asked in vain.

    Where nothing is, a deploy that was killed may have left other models all the same: the last step puts that right, and
    otherwise finds the versions that run.

    Raises:
        RolloutRefused: it could not be done, and what ran before runs again.
    """
    before, after = running.deployments(), new.deployments()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    timeout_s = new.settings.rollout.ready_timeout_s
    try:
        if changed:
            say(f"traffic moves: {', '.join(changed)}")
            run(app_of(running, models_of(running) | models_of(new)), timeout_s=timeout_s)
            run(app_of(new, models_of(running) | models_of(new)), timeout_s=timeout_s)
        else:
            say("nothing changes; what a deploy that was killed may have left is put right")
        run(app_of(new, models_of(new)), timeout_s=timeout_s)
    except BaseException as error:
        say("rolling back")
        run(app_of(running, models_of(running)), timeout_s=timeout_s)
        if isinstance(error, LaunchError):
            raise RolloutRefused(f"The new settings could not be served, the old ones are again. {error.message}") from error
        raise


def _names(models: Sequence[ServedModel]) -> str:
    return ", ".join(model.name for model in models)

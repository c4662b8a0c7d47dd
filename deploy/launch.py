"""Ray on this machine, and the application on it until a signal comes.

    local_ray() ─→ running_app(settings, port) ─→ ready ─→ SIGINT / SIGTERM ─→ drain ─→ Ray ends

``RAY_ADDRESS`` set: the running cluster it names is used, and left running.
"""

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import ray
from ray import serve

from actors.errors import FleetError
from actors.images import encode_jpeg
from actors.settings import ActorSettings
from deploy.app import APP_NAME, build_app
from deploy.settings import AppSettings

ANY_HOST = "0.0.0.0"  # noqa: S104 - listening everywhere is the user's choice, never the default


class LaunchError(FleetError):
    """The application cannot be started on this machine or cluster."""

    code = "launch_error"


@contextmanager
def local_ray(num_cpus: int | None = None) -> Iterator[None]:
    """Start Ray on this machine and end it on leaving; or join the cluster that ``RAY_ADDRESS`` names.

    Args:
        num_cpus: CPUs that a local Ray offers; all of this machine's if None.
    """
    joining = "RAY_ADDRESS" in os.environ
    local: dict[str, Any] = {} if joining else {"num_cpus": num_cpus, "include_dashboard": False}
    ray.init(logging_level=logging.WARNING, log_to_driver=False, **local)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init takes it for itself and aborts
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def running_app(settings: AppSettings, host: str, port: int) -> Iterator[str]:
    """Run the application; yields its address when every replica has answered real inferences, drains on leaving.

    Args:
        settings: the application.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.

    Raises:
        LaunchError: the port is taken, the reservations do not fit, or a model cannot be loaded.
    """
    port = port or free_port(host)
    if not serve.status().proxies:  # else Serve runs here already, on a port of its own
        _check_port(host, port)
    check_fits([(model.replicas.min, model.actor) for model in settings.models], "--replicas", "replica")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    try:
        try:
            serve.run(build_app(settings), name=APP_NAME, route_prefix="/", logging_config={"log_level": "WARNING"})
        except RuntimeError as error:
            raise LaunchError(_why_failed(error)) from error
        address = f"http://{'127.0.0.1' if host == ANY_HOST else host}:{port}"
        _check_answers(address, settings)
        yield address
    finally:
        serve.delete(APP_NAME)  # drains: requests in flight are answered


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, instead of interrupting whatever runs."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def reservation(workers: int, num_cpus: float | None, num_gpus: float | None) -> ActorSettings:
    """What each of ``workers`` actors reserves; None means an equal share of what Ray has here.

    With a GPU an actor's CPU only feeds it, and one is enough.
    """
    offered = ray.cluster_resources()
    if num_gpus is None:
        gpus = offered.get("GPU", 0)
        num_gpus = 1.0 if gpus >= workers else int(100 / math.ceil(workers / gpus)) / 100 if gpus else 0.0
    if num_cpus is None:
        share = offered.get("CPU", 1) / workers
        num_cpus = min(1.0, share) if num_gpus or share < 1 else float(int(share))
    return ActorSettings(num_cpus=num_cpus, num_gpus=num_gpus)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Give another --port, or end who has it"
                " (an earlier run that was killed may have left its proxy behind)"
            ) from error


def _check_answers(address: str, settings: AppSettings) -> None:
    """One real request per model over real HTTP: the last link that the replicas' own warm-up does not prove."""
    grey = encode_jpeg(np.full((64, 64, 3), 114, np.uint8))
    for model in settings.models:
        try:
            answer = httpx.post(f"{address}/predict", files={"file": grey}, data={"model": model.name}, timeout=60)
        except httpx.HTTPError as error:
            raise LaunchError(
                f"The application runs, but does not answer at {address}: {error}. If this cluster's Serve was started"
                " before with another address, give that as --host and --port"
            ) from error
        if answer.is_error:
            raise LaunchError(f"{model.name} cannot answer a request: {answer.text}")


def check_fits(reserved: Iterable[tuple[int, ActorSettings]], count_flag: str, noun: str) -> None:
    """Refuse at once what Ray would wait for without end; on a cluster of several nodes more may come.

    Args:
        reserved: how many actors, and what each reserves.
        count_flag: the flag that sets their number, for the message.
        noun: what the actors are called there.

    Raises:
        LaunchError: this machine can never hold them all.
    """
    if len(ray.nodes()) > 1:
        return
    reserved = list(reserved)
    offered = ray.cluster_resources()
    for resource in ("CPU", "GPU"):
        field = f"num_{resource.lower()}s"
        needed = sum(max(count, 1) * getattr(actor, field) for count, actor in reserved)
        if needed > offered.get(resource, 0) + 1e-6:
            raise LaunchError(
                f"The {noun}s reserve {needed:g} {resource}s and Ray has {offered.get(resource, 0):g} here:"
                f" lower {count_flag} or --{resource.lower()}s-per-{noun}"
            )


def _why_failed(error: RuntimeError) -> str:
    """The replica's own sentence out of Serve's report, which quotes its whole traceback."""
    statuses = serve.status().applications.get(APP_NAME)
    messages = [deployment.message for deployment in statuses.deployments.values()] if statuses else []
    for line in reversed("\n".join(messages).splitlines()):
        _, found, sentence = line.partition("Error: ")
        if found:
            return sentence.strip()
    return f"The application did not start: {error}"

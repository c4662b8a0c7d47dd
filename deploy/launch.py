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
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve import Application
from ray.serve.schema import ApplicationStatus, ProxyStatus

from actors.errors import FleetError
from actors.settings import ActorSettings
from deploy.app import build_app
from deploy.environment import free_port
from deploy.logs import for_job, for_serve
from deploy.settings import APP_NAME, AppSettings, LogSettings

POLL_S = 0.1
CONNECT_TIMEOUT_S = 5.0
ROUTE_TIMEOUT_S = 10.0
PROXY_TIMEOUT_S = 60.0
ANY_HOST = "0.0.0.0"  # noqa: S104 - listening everywhere is the user's choice, never the default


class LaunchError(FleetError):
    """The application cannot be started on this machine or cluster."""

    code = "launch_error"


@contextmanager
def local_ray(num_cpus: int | None = None, log: LogSettings | None = None) -> Iterator[None]:
    """Start Ray on this machine and end it on leaving; or join the cluster that ``RAY_ADDRESS`` names.

    Args:
        num_cpus: CPUs that a local Ray offers; all of this machine's if None.
        log: how this process and its actors log; as they do already if None.
    """
    joining = "RAY_ADDRESS" in os.environ
    # "local", else Ray would join whatever cluster somebody has started on this machine
    local: dict[str, Any] = {} if joining else {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    if log:
        logging.getLogger().handlers.clear()  # Ray's takes their place
    ray.init(logging_level=logging.WARNING, log_to_driver=False, logging_config=for_job(log) if log else None, **local)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init takes it for itself and aborts
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def joined_ray() -> Iterator[None]:
    """Join a cluster that runs: the one that ``RAY_ADDRESS`` names, else this machine's.

    Raises:
        LaunchError: there is none, or it does not let us in.
    """
    address = os.environ.get("RAY_ADDRESS", "auto")
    host, separator, port = address.rpartition(":")
    try:
        if separator and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # OSError, ConnectionError, RuntimeError, RaySystemError: there is one for each stage
        raise LaunchError(
            f"Cannot join a running cluster at '{address}': set RAY_ADDRESS to the address that 'yolofleet serve' or"
            " 'ray start' has printed, and RAY_AUTH_TOKEN (with RAY_AUTH_MODE=token) to the token that it was started with"
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init takes it for itself and aborts
    try:
        yield
    finally:
        ray.shutdown()


def cluster_address() -> str:
    """What another process sets as ``RAY_ADDRESS`` to join this cluster."""
    return str(ray.get_runtime_context().gcs_address)


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
    try:
        yield start_app(settings, host, port)
    finally:
        if APP_NAME in serve.status().applications:  # else it was refused before it began
            stop(APP_NAME)


def start_app(settings: AppSettings, host: str, port: int) -> str:
    """Start the application where none runs; returns its address when every replica has answered real inferences.

    Raises:
        LaunchError: see ``running_app``.
    """
    port = port or free_port(host)
    if not serve.status().proxies:  # else Serve runs here already, on a port of its own
        _check_port(host, port)
    check_fits([(model.replicas.min, model.actor) for model in settings.models], "--replicas", "replica")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _starting_serve(host, port, settings.log):
        run(build_app(settings))
    address = f"http://{'127.0.0.1' if host == ANY_HOST else host}:{port}"
    _check_answers(address)
    return address


@contextmanager
def _starting_serve(host: str, port: int, log: LogSettings) -> Iterator[None]:
    """Serve, from when it takes applications on; its proxies are ready on leaving, and start while the replicas do."""
    with ThreadPoolExecutor(1, "serve") as thread:
        started = thread.submit(serve.start, http_options={"host": host, "port": port}, logging_config=for_serve(log))
        while not (serve.status().proxies or started.done()):
            time.sleep(POLL_S)
        if started.done():
            started.result()
        yield
        try:
            started.result()
        except (ActorDiedError, TimeoutError) as error:  # Serve ends a proxy that takes too long, and begins another
            give_up = time.monotonic() + PROXY_TIMEOUT_S
            while ProxyStatus.HEALTHY not in serve.status().proxies.values():
                if time.monotonic() > give_up:
                    raise LaunchError(f"Serve's proxy does not start at {host}:{port}; Ray's logs say why") from error
                time.sleep(POLL_S)


def run(application: Application, name: str = APP_NAME, route: str | None = "/", timeout_s: float = math.inf) -> None:
    """Give Serve an application, or another version of it, and wait until that runs and what it replaces is gone.

    Args:
        application: what shall run.
        name: under which it runs.
        route: its address, None for one that is reached through handles only.
        timeout_s: how long it may take.

    Raises:
        LaunchError: a replica cannot be started, or took too long.
    """
    target = serve.RunTarget(application, name, route)
    serve.run_many([target], wait_for_applications_running=False)
    give_up = time.monotonic() + timeout_s
    while (status := serve.status().applications[name].status) is not ApplicationStatus.RUNNING:
        if status is ApplicationStatus.DEPLOY_FAILED:
            raise LaunchError(_why_failed(name))
        if time.monotonic() > give_up:
            raise LaunchError(f"The replicas were not ready after {timeout_s:g} s: {_messages(name) or 'Serve says no more'}")
        time.sleep(POLL_S)


def stop(name: str) -> None:
    """End an application, and wait until it is gone: what it has in hand is answered, for as long as that may take."""
    serve.delete(name, _blocking=False)  # else Serve looks once a second, and raises after a minute
    while name in serve.status().applications:
        time.sleep(POLL_S)


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


def _check_answers(address: str) -> None:
    """Readiness over real HTTP: the last link that the replicas' own warm-up does not prove."""
    give_up = time.monotonic() + ROUTE_TIMEOUT_S
    try:
        while (answer := httpx.get(f"{address}/readyz", timeout=60)).is_error and time.monotonic() < give_up:
            time.sleep(POLL_S)  # a proxy has not heard of the new application yet, or a model has just fallen asleep
    except httpx.HTTPError as error:
        raise LaunchError(
            f"The application runs, but does not answer at {address}: {error}. If this cluster's Serve was started"
            " before with another address, give that as --host and --port"
        ) from error
    if answer.is_error:
        raise LaunchError(f"The application runs, but is not ready: {answer.text}")


def check_fits(reserved: Iterable[tuple[int, ActorSettings]], count_flag: str, noun: str) -> None:
    """Refuse at once what Ray would wait for without end; on a cluster of several nodes more may come.

    Args:
        reserved: how many actors, and what each reserves.
        count_flag: the flag that sets their number, for the message.
        noun: what the actors are called there.

    Raises:
        LaunchError: this machine can never hold them all.
    """
    reserved, offered = list(reserved), ray.cluster_resources()
    if len(ray.nodes()) > 1 or not offered.get("CPU"):  # a head without CPUs is one of a cluster whose workers are to come
        return
    for resource in ("CPU", "GPU"):
        field = f"num_{resource.lower()}s"
        needed = sum(max(count, 1) * getattr(actor, field) for count, actor in reserved)
        if needed > offered.get(resource, 0) + 1e-6:
            raise LaunchError(
                f"The {noun}s reserve {needed:g} {resource}s and Ray has {offered.get(resource, 0):g} here:"
                f" lower {count_flag} or --{resource.lower()}s-per-{noun}"
            )


def _why_failed(name: str) -> str:
    """The replica's own sentence out of Serve's report, which quotes its whole traceback."""
    messages = _messages(name)
    for line in reversed(messages.splitlines()):
        _, found, sentence = line.partition("Error: ")
        if found:
            return sentence.strip()
    return f"The application did not start: {messages or 'see the logs of Ray Serve'}"


def _messages(name: str) -> str:
    application = serve.status().applications[name]
    deployments = [deployment.message for deployment in application.deployments.values()]
    return "\n".join(message for message in (application.message, *deployments) if message)

"""One log for everything that a process of the fleet has to say, with the ids to follow it by.

    LogSettings ─ for_serve ─→ Serve's handlers on "ray.serve": request_id, deployment, replica, actor_id, node_id
                                 └ log_with_serve: our loggers in that process write through them too
                └ for_job ───→ Ray's handlers in driver and actors of a dataset job: job_id, actor_id, node_id

``request_id`` is what the client reads as ``X-Request-Id``: Serve's proxies give one to every request that has none.
"""

import logging
from typing import Any

import ray

from deploy.settings import LogSettings

OURS = ("actors", "deploy")
SERVE = "ray.serve"


def for_serve(log: LogSettings) -> dict[str, Any]:
    """The ``logging_config`` of Serve and of each deployment."""
    return {"log_level": log.level, "encoding": log.format.upper(), "additional_log_standard_attrs": ["name"]}


def for_job(log: LogSettings) -> ray.LoggingConfig:
    """The ``logging_config`` of ``ray.init``, for the driver and everything that it starts."""
    return ray.LoggingConfig(encoding=log.format.upper(), log_level=log.level, additional_log_standard_attrs=["name"])


def log_with_serve() -> None:
    """Let our loggers in this process write where Serve's does, at its level, whatever becomes of its handlers later."""
    serve = logging.getLogger(SERVE)
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = serve.handlers, False
        logger.setLevel(serve.level)

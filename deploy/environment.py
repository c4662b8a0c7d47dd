"""Environment variables that must stand before Ray is first imported, because Ray reads them then and never again."""

import os
import secrets


def prepare_environment() -> None:
    """Set what this process and every Ray process started by it inherit; whatever the user has set stays.

    Call it before anything imports ray. With ``RAY_ADDRESS`` set, a running cluster is joined and its token is the user's
    to give.
    """
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
        # A token of our own: without one Ray writes its own to the home folder, or trusts one that was left there.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # no second installation: the environment is here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # an actor with num_gpus=0 sees no GPU
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

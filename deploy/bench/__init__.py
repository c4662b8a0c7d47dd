"""Measurements of this machine: what it can do at most, and how much of that a user gets. Ratios within one run."""

from actors.errors import FleetError


class BenchError(FleetError):
    """A measurement could not be made."""

    code = "bench_error"

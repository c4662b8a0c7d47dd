"""docs/operations.md: every error code with its status, and a command that Ray hides from its help."""

import importlib
import re
from collections.abc import Iterator

from ray.scripts.scripts import cli

from actors.errors import FleetError
from tests.conftest import REPOSITORY
from tests.unit.test_imports import FILES

PAGE = (REPOSITORY / "docs" / "operations.md").read_text()


def errors(parent: type[FleetError] = FleetError) -> Iterator[type[FleetError]]:
    yield parent
    for child in parent.__subclasses__():
        yield from errors(child)


def test_the_table_has_every_code_with_its_status() -> None:
    for module in [name for name, path in FILES.items() if "FleetError" in path.read_text()]:
        importlib.import_module(module)
    listed = re.findall(r"^\| `(\w+)` \| (\d{3}) \| \S.* \| \S.* \|$", PAGE, re.MULTILINE)
    assert listed == sorted({(error.code, str(error.status)) for error in errors() if error.__module__ in FILES})
    assert len({code for code, _ in listed}) == len(listed)


def test_a_node_is_drained_with_what_ray_has() -> None:
    (arguments,) = re.findall(r"`ray drain-node (.+?)`", PAGE)
    assert cli.commands["drain-node"].make_context("drain-node", arguments.split()).params["node_id"] == "ID"

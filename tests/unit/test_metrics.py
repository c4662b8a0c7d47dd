"""The operators' list of metrics is the declared one."""

import re

from ray.util.metrics import Counter

from actors.metrics import DECLARED, LABELS, STAGES
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "metrics.md").read_text()


def test_the_documentation_lists_every_metric_with_its_type_labels_and_meaning() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+?) \| (.+?) \|$", TEXT, re.MULTILINE)
    assert listed == [
        (
            f"ray_{name}_total" if kind is Counter else f"ray_{name}",
            kind.__name__.lower(),
            " ".join(f"`{label}`" for label in (*LABELS, *extra)),
            meaning,
        )
        for name, (kind, meaning, extra) in DECLARED.items()
    ]


def test_the_documentation_asks_for_nothing_else() -> None:
    names = {f"ray_{name}" for name in DECLARED}
    suffix = r"(_total|_bucket|_count|_sum)?$"
    assert {re.sub(suffix, "", found) for found in re.findall(r"ray_yolofleet_\w+", TEXT)} == names
    assert all(f"`{stage}`" in TEXT for stage in STAGES)

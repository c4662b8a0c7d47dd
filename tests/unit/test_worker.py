"""The worker for Ray Data, without Ray: one input's failure is its own row's."""

import pyarrow as pa
import pytest

from actors import worker
from actors.settings import ModelSettings
from actors.worker import DetectionWorker
from tests.conftest import picture


def test_an_unexpected_error_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(uri: str) -> bytes:
        if uri == "b":
            raise RuntimeError("a library's own error")
        return picture()

    monkeypatch.setattr(worker, "read_input", read)
    detect = DetectionWorker(ModelSettings(name="fake", weights="fake:"))
    rows = detect(pa.table({"uri": ["a", "b", "c"]})).to_pylist()
    assert [row["error"] for row in rows] == [None, "RuntimeError: a library's own error", None]
    assert [row["width"] for row in rows] == [64, None, 64]

"""A replica's shell without Ray: what is alone in hand, and what is left of it when its client has gone."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from actors.schemas import PredictParams
from actors.settings import ImageLimits
from deploy import replica
from deploy.quarantine import CrashJournal, digest_of
from deploy.replica import ModelReplica
from deploy.settings import ServedModel
from tests.conftest import picture, video

SLOTS = 1024


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelReplica]:
    """A replica whose batches wait while ``tmp_path / "gate"`` exists."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "a1"))
    for name, stand_in in (("log_with_serve", lambda: None), ("node_folder", lambda: tmp_path), ("Place", lambda *_: None)):
        monkeypatch.setattr(replica, name, stand_in)
    made = ModelReplica(ServedModel(name="m", weights=f"fake:?gate={tmp_path / 'gate'}"), ImageLimits())
    yield made
    made.close()


def in_hand(journal: CrashJournal) -> int:
    return SLOTS - len(journal._free)


async def test_a_video_says_when_it_is_alone_in_hand_and_not_before(shell: ModelReplica, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", frames=3)
    async with aclosing(shell.frames(clip, PredictParams(), 60.0, alone=True)) as answers:
        async with shell._in_hand(digest_of(b"another"), alone=True):
            begins = asyncio.create_task(anext(answers))
            for _ in range(9):
                await asyncio.sleep(0)
            assert not begins.done()
        assert await begins is None
        assert in_hand(shell._journal) == 1
        assert len([answer async for answer in answers if answer is not None]) == 3
    assert len([answer async for answer in shell.frames(clip, PredictParams(), 60.0)]) == 3


async def test_an_image_is_alone_in_hand_until_its_answer_has_arrived(shell: ModelReplica) -> None:
    """Else the next one alone, which kills the process, takes an answer along that was on its way."""
    async with aclosing(shell.detect_alone(picture(), PredictParams(), 60.0)) as answers:
        assert await anext(answers) is None
        assert await anext(answers)
        goes_on = asyncio.create_task(anext(answers))
        await asyncio.sleep(0)
        assert in_hand(shell._journal) == 1
        goes_on.cancel()  # as Serve does when the caller leaves
        with pytest.raises(asyncio.CancelledError):
            await goes_on
    assert in_hand(shell._journal) == 0


async def test_an_image_whose_client_has_gone_leaves_nothing_in_hand(shell: ModelReplica, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    asked = [asyncio.create_task(shell.detect(picture(blue=blue), PredictParams(), 60.0)) for blue in range(2)]
    while in_hand(shell._journal) < 2:
        await asyncio.sleep(0)
    for each in asked:
        each.cancel()
    (tmp_path / "gate").unlink()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*asked, return_exceptions=True))
    assert in_hand(shell._journal) == 0
    async with asyncio.timeout(10), shell._company.alone():
        pass

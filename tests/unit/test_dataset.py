"""Sources → inputs → shards, and the ledger: what a source may be, and that done means committed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.dataset import Shard, into_shards, list_inputs
from actors.errors import BadSource, OutputMismatch
from actors.ledger import DeadLetter, Ledger, Manifest, totals
from actors.schemas import Detection, ImageResult, Points
from actors.writers import SCHEMA, row
from tests.conftest import picture

JOB = {"model": "m", "weights_sha256": "0", "params": {"conf": 0.25, "iou": 0.7}}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "deep/c.webp", "deep/er/d.bmp"):
        (folder / name).write_bytes(picture())
    (folder / "notes.md").write_text("no image")
    return folder


def names(found: Iterable[str]) -> list[str]:
    return [Path(uri).name for uri in found]


def test_a_folder_is_searched_recursively_for_images(pictures: Path) -> None:
    assert names(list_inputs([str(pictures)])) == ["a.png", "b.JPG", "c.webp", "d.bmp"]


def test_globs_cross_folders_with_two_stars(pictures: Path) -> None:
    assert names(list_inputs([f"{pictures}/*"])) == ["a.png", "b.JPG"]
    assert names(list_inputs([f"{pictures}/**/*"])) == ["a.png", "b.JPG", "c.webp", "d.bmp"]


def test_a_list_names_files_beside_it_and_skips_comments(pictures: Path) -> None:
    (pictures / "list.txt").write_text("# two\na.png\n\ndeep/c.webp\nmissing.jpg\n")
    assert sorted(names(list_inputs([str(pictures / "list.txt")]))) == ["a.png", "c.webp", "missing.jpg"]


def test_every_input_is_listed_once(pictures: Path) -> None:
    assert len(list_inputs([str(pictures), f"{pictures}/*", str(pictures / "a.png")])) == 4


def test_a_file_that_is_named_itself_is_listed_whatever_its_suffix(pictures: Path) -> None:
    assert names(list_inputs([str(pictures / "notes.md")])) == ["notes.md"]


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.jpg", "deep/er/*.jpg"])
def test_a_source_without_images_is_an_error_that_names_it(source: str, pictures: Path) -> None:
    with pytest.raises(BadSource, match=source.replace("*", r"\*")):
        list_inputs([f"{pictures}/{source}"])


def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "er":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)  # root may read whatever the mode says
    with pytest.raises(BadSource, match=r"Permission denied: .*deep/er"):
        list_inputs([str(pictures)])


def test_links_to_files_are_followed_and_links_to_folders_are_not(pictures: Path) -> None:
    (pictures / "file.png").symlink_to(pictures / "a.png")
    (pictures / "circle").symlink_to(pictures)
    (pictures / "broken.png").symlink_to(pictures / "gone.png")
    assert names(list_inputs([str(pictures)])) == ["a.png", "b.JPG", "c.webp", "d.bmp", "file.png"]


@pytest.mark.parametrize("name", ["\udcff.png", "\udcff.mp4", "\udcff.tar"])
def test_a_file_whose_name_is_not_utf8_is_one_input(name: str, pictures: Path) -> None:
    (pictures / name).write_bytes(picture())
    suffix = Path(name).suffix
    for source in (f"{pictures}/{name}", f"{pictures}/*{suffix}"):
        assert f"{pictures}/{name}" in list_inputs([source])


def test_a_folder_whose_name_is_not_utf8_is_refused(pictures: Path) -> None:
    (pictures / "\udcff").mkdir()
    with pytest.raises(BadSource, match="not UTF-8"):
        list_inputs([f"{pictures}/\udcff"])


def test_shards_hold_every_input_once_and_give_each_worker_several() -> None:
    uris = [f"{n:04d}" for n in range(1000)]
    shards = list(into_shards(uris, workers=2))
    assert [uri for shard in shards for uri in shard.uris] == uris
    assert len(shards) >= 8
    assert max(len(shard.uris) for shard in into_shards(uris, workers=1, largest=100)) == 100


def a_row(uri: str) -> dict[str, object]:
    outline = Points((1.0, 2.0), (3.0, 4.0))
    found = Detection(3, "gear", 0.5, (1.0, 2.0, 3.0, 4.0), segments=outline)
    return row(uri, "f" * 64, "m", ImageResult(64, 48, "segment", (found,)))


def commit(ledger: Ledger, *uris: str, letters: tuple[DeadLetter, ...] = ()) -> Shard:
    shard = Shard((*uris, *(letter.uri for letter in letters)))
    ledger.commit(shard, [a_row(uri) for uri in uris], Manifest(len(uris), letters, {"gear": len(uris)}, {"decode": 1.5}))
    return shard


def test_a_committed_shard_is_one_file_with_rows_manifest_and_job(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "out", JOB)
    letter = DeadLetter("c", "decode", "truncated")
    shard = commit(ledger, "a", "b", letters=(letter,))
    (file,) = (tmp_path / "out" / "detections").iterdir()
    table = pq.read_table(file)
    assert table.schema.equals(SCHEMA, check_metadata=False)
    assert json.loads(table.schema.metadata[b"yolofleet"])["job"] == JOB
    assert table.column("detections")[0].as_py()[0]["segments"] == {"x": [1.0, 2.0], "y": [3.0, 4.0], "visible": None}
    assert ledger.committed() == {"a", "b", "c"}
    assert ledger.manifest(shard) == Manifest(2, (letter,), {"gear": 2}, {"decode": 1.5})


def test_a_shard_without_rows_has_the_same_columns(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, JOB)
    commit(ledger, letters=(DeadLetter("a", "read", "gone"),))
    (file,) = (tmp_path / "detections").iterdir()
    assert pq.read_schema(file).equals(SCHEMA, check_metadata=False)


def test_the_same_job_resumes_and_sweeps_what_was_half_written(tmp_path: Path) -> None:
    first = Ledger.open(tmp_path, JOB)
    commit(first, "a")
    (tmp_path / ".pending" / first.run / "half").write_text("half a shard")
    second = Ledger.open(tmp_path, JOB)
    assert second.committed() == {"a"}
    assert [path.name for path in (tmp_path / ".pending").iterdir()] == [second.run]


def test_an_actor_that_outlives_its_run_cannot_commit(tmp_path: Path) -> None:
    zombie = Ledger.open(tmp_path, JOB)
    Ledger.open(tmp_path, JOB)
    with pytest.raises(FileNotFoundError):
        commit(zombie, "a")
    assert not (tmp_path / "detections").exists()


def test_another_job_is_refused_with_the_difference(tmp_path: Path) -> None:
    Ledger.open(tmp_path, JOB)
    with pytest.raises(OutputMismatch, match=r"conf was 0\.25, is 0\.5"):
        Ledger.open(tmp_path, JOB | {"params": {"conf": 0.5, "iou": 0.7}})


def test_fresh_starts_over(tmp_path: Path) -> None:
    commit(Ledger.open(tmp_path, JOB), "a")
    assert Ledger.open(tmp_path, JOB | {"model": "other"}, fresh=True).committed() == set()


def test_a_folder_with_files_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(OutputMismatch, match="none of ours"):
            Ledger.open(tmp_path, JOB, fresh=fresh)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"name": "train"}'])
def test_a_job_file_of_somebody_else_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(content)
    (tmp_path / "yolo").mkdir()
    for fresh in (False, True):
        with pytest.raises(OutputMismatch, match=r"job\.json is none of ours"):
            Ledger.open(tmp_path, JOB, fresh=fresh)
    with pytest.raises(OutputMismatch, match=r"job\.json is none of ours"):
        Ledger.requested(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "yolo"}


def test_fresh_throws_nothing_away_where_it_is_refused(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, JOB)
    commit(ledger, "a")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputMismatch, match="none of ours"):
        Ledger.open(tmp_path, JOB, fresh=True)
    assert ledger.committed() == {"a"}


def test_finishing_writes_the_dead_letters_and_leaves_nothing_temporary(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, JOB)
    commit(ledger, "a", letters=(DeadLetter("z", "decode", "truncated"),))
    commit(ledger, "b", letters=(DeadLetter("y", "read", "gone"),))
    ledger.finish({"inputs": 4})
    letters = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [letter["uri"] for letter in letters] == ["y", "z"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"inputs": 4}
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "detections", "errors.jsonl", "summary.json"}
    assert totals(ledger.manifests()).classes == {"gear": 2}


def test_a_job_keeps_to_the_engine_that_it_was_begun_with(tmp_path: Path) -> None:
    Ledger.open(tmp_path, JOB).settle_engine("openvino fp32")
    again = Ledger.open(tmp_path, JOB)
    again.settle_engine("openvino fp32")
    with pytest.raises(OutputMismatch, match=r"begun with the engine openvino fp32, .* go on with torch fp32"):
        again.settle_engine("torch fp32")
    Ledger.open(tmp_path, JOB, fresh=True).settle_engine("torch fp32")

"""Storage and what is listed in it: local files, containers, a web server, and a real S3 on loopback."""

import base64
import csv
import functools
import http.server
import io
import json
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import containers, storage
from actors.containers import split_member
from actors.dataset import list_inputs, read_input
from actors.errors import BadSource, OutputMismatch
from actors.ledger import DeadLetter, Ledger, Manifest
from actors.storage import Storage, locate
from tests.conftest import picture
from tests.unit.test_dataset import JOB, commit

PICTURES = {f"{number:02d}.png": picture(blue=number) for number in range(12)}


def tar_of(pictures: dict[str, bytes]) -> bytes:
    """A tar in WebDataset's layout: every picture with a ``.cls`` beside it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in pictures.items():
            for member, content in ((name, data), (f"{name[:-4]}.cls", b"3")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_all(*sources: str, column: str | None = None) -> list[bytes]:
    return [read_input(uri) for uri in list_inputs(sources, column)]


def test_the_images_of_a_tar_are_inputs_and_each_costs_its_own_bytes(tmp_path: Path) -> None:
    shard = tmp_path / "shard-0001.tar"
    shard.write_bytes(tar_of({f"cat/{name}": data for name, data in PICTURES.items()}))
    found = list_inputs([str(shard)])
    assert list(found) == [f"{shard}#cat/{name}" for name in PICTURES]
    assert len(set(found.values())) == 1  # its version is the shard's
    opened = containers._open_tar.cache_info().misses
    assert [read_input(uri) for uri in found] == list(PICTURES.values())
    assert containers._open_tar.cache_info().misses == opened  # listing has left the index


def test_rows_of_a_column_of_bytes_are_inputs_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    plain = pa.table({"note": ["x"] * 12, "image": list(PICTURES.values())})
    pq.write_table(plain, file, row_group_size=5)
    found = list_inputs([str(file)])
    assert list(found)[-1] == f"{file}#image[000000011]"
    assert [read_input(uri) for uri in found] == list(PICTURES.values())
    hugging_face = [{"bytes": data, "path": name} for name, data in PICTURES.items()]
    pq.write_table(pa.table({"image": hugging_face}), tmp_path / "hf.parquet", row_group_size=5)
    assert read_all(str(tmp_path / "hf.parquet")) == list(PICTURES.values())


def test_a_row_without_bytes_and_a_member_that_is_gone_cannot_be_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [None, b"x"]}, pa.schema([("image", pa.binary())])), tmp_path / "t.parquet")
    (tmp_path / "t.tar").write_bytes(tar_of(PICTURES))
    for uri in ("t.parquet#image[000000000]", "t.parquet#image[000000009]", "t.tar#none.png", "none.tar#00.png"):
        with pytest.raises(OSError, match=r"null|does not hold|No such file"):
            read_input(str(tmp_path / uri))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_of_uris_names_files_beside_the_table_or_anywhere(kind: str, tmp_path: Path) -> None:
    for name, data in PICTURES.items():
        (tmp_path / name).write_bytes(data)
    rows = [{"id": str(number), "File_Name": name, "other": name} for number, name in enumerate(PICTURES)]
    rows[0]["File_Name"] = str(tmp_path / "00.png")
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    found = list_inputs([str(table)])
    assert list(found) == [str(tmp_path / name) for name in PICTURES]
    assert None not in found.values()
    assert list(list_inputs([str(table)], "other")) == list(found)
    with pytest.raises(BadSource, match=r"no column 'nix'.*File_Name"):
        list_inputs([str(table)], "nix")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("mark", ["", "data:image/png;base64,"])
def test_rows_of_text_may_hold_images_in_base64(kind: str, mark: str, tmp_path: Path) -> None:
    values = [mark + base64.b64encode(data).decode() for data in PICTURES.values()]
    table = tmp_path / f"table.{kind}"
    notes = ['two\nlines, "quoted"', "", "ä"] * 4
    if kind == "csv":
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("note", "image"), *zip(notes, values, strict=True)])
    else:
        rows = [{"note": note, "image": value} for note, value in zip(notes, values, strict=True)]
        table.write_text("\n".join(json.dumps(row) + "\n" for row in rows))  # a blank line between any two
    found = list_inputs([str(table)])
    assert list(found)[-1] == f"{table}#image[000000011]"
    assert [read_input(uri) for uri in found] == list(PICTURES.values())
    with pytest.raises(OSError, match="does not hold"):
        read_input(f"{table}#image[000000012]")


def test_a_list_of_shards_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(PICTURES))
    (tmp_path / "shards.txt").write_text("a.tar\n")
    assert len(list_inputs([str(tmp_path / "shards.txt")])) == 12
    assert len(list_inputs([f"{tmp_path}/*.tar"])) == 12


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut.tar", tar_of(PICTURES)[:5000], "cannot be read"),
        ("empty.tar", b"", "cannot be read"),
        ("no.parquet", b"PAR1", "cannot be read"),
        ("no.csv", b"", "cannot be read"),
        ("wide.csv", b"a,b\n1,2\n", r"no column that says.*a, b"),
        ("no.jsonl", b"{", "Line 1 .* not JSON"),
        ("array.jsonl", b"[1]\n", "Line 1 .* no JSON object"),
        ("none.jsonl", b'{"n": 1}\n', "no column that says"),
        ("latin.txt", b"\xe4.jpg\n", "not UTF-8"),
        ("none.txt", b"# nothing\n", "holds no image"),
    ],
)
def test_a_container_that_cannot_be_listed_is_an_error_that_names_it(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadSource, match=says) as error:
        list_inputs([str(tmp_path / name)])
    assert name in error.value.message


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_a_member_is_told_from_its_container_whatever_its_name(member: str) -> None:
    assert split_member(f"s3://bucket/a.b/shard.tar#{member}") == ("s3://bucket/a.b/shard.tar", member)
    assert split_member(f"/İİ/SHARD.TAR#{member}") == ("/İİ/SHARD.TAR", member)  # whose lower case is longer
    assert split_member("/photos/tar#1.jpg") is None


@pytest.mark.parametrize(
    "source", ["ftp://host/a.jpg", "az://container/a.jpg", "http://127.0.0.1:1/a.txt", "http://127.0.0.1:1/"]
)
def test_a_place_that_cannot_be_reached_is_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(BadSource):
        list_inputs([source])


@pytest.mark.parametrize(("scheme", "kind"), [("gs", "gcs"), ("az", "abfs")])
def test_the_other_clouds_are_pyarrow_s_own(scheme: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_filesystem", storage._filesystem.__wrapped__)
    monkeypatch.setattr(storage, "_RETRY_S", 1)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    for name, value in (("ACCOUNT_NAME", "a"), ("ACCOUNT_KEY", "a2V5"), ("ENDPOINT", "http://127.0.0.1:1")):
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    assert locate(f"{scheme}://bucket/in/a.jpg")[0].type_name == kind
    assert locate(f"{scheme}://bucket/in/a.jpg")[1] == "bucket/in/a.jpg"
    if scheme == "gs":  # Azure's client cannot be told to give up as soon
        with pytest.raises(BadSource, match="'gs://bucket/in' cannot be listed"):
            list_inputs(["gs://bucket/in"])


def test_a_pyarrow_that_was_built_without_a_cloud_names_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_filesystem", storage._filesystem.__wrapped__)
    monkeypatch.setitem(sys.modules, "pyarrow._gcsfs", None)
    monkeypatch.delattr("pyarrow.fs.GcsFileSystem", raising=False)
    monkeypatch.setattr("pyarrow.fs._not_imported", ["GcsFileSystem"])
    with pytest.raises(BadSource, match="pip install pyarrow"):
        list_inputs(["gs://bucket/in"])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of a folder with pictures and a list."""
    folder = tmp_path / "web"
    folder.mkdir()
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    (folder / "list.txt").write_text(f"00.png\n{address}/01.png\nnone.png\n")
    yield address
    server.shutdown()


def test_the_web_is_read_but_not_written(web: str) -> None:
    found = list_inputs([f"{web}/list.txt"])
    assert list(found) == [f"{web}/00.png", f"{web}/01.png", f"{web}/none.png"]
    assert read_input(f"{web}/01.png") == PICTURES["01.png"]
    with pytest.raises(OSError, match=r"none\.png"):
        read_input(f"{web}/none.png")
    with pytest.raises(BadSource, match="Nothing can be written"):
        Ledger.open(f"{web}/out", JOB)


@pytest.fixture
def filled(bucket: str) -> str:
    """A bucket with pictures, whose keys are as odd as keys may be, in ``in/``, and a tar and a table beside it."""
    store = Storage.at(bucket)
    store.lease(".pending/test")
    for number, (name, data) in enumerate(PICTURES.items()):
        store.put(f"in/{'deep er/' if number % 2 else ''}ä #?%20+{name}", data, ".pending/test")
    store.put("in/notes.md", b"no picture", ".pending/test")
    store.put("shards/a.tar", tar_of(PICTURES), ".pending/test")
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": list(PICTURES.values())}), buffer, row_group_size=5)
    store.put("tables/a.parquet", buffer.getvalue(), ".pending/test")
    store.delete(".pending")
    return bucket


def test_a_tar_on_a_web_server_is_read_by_ranges(filled: str) -> None:
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{filled.removeprefix('s3://')}"
    assert read_all(f"{address}/shards/a.tar") == list(PICTURES.values())


def test_a_bucket_is_listed_read_and_globbed(filled: str) -> None:
    found = list_inputs([f"{filled}/in"])
    assert len(found) == 12
    assert None not in found.values()
    assert sorted(read_input(uri) for uri in found) == sorted(PICTURES.values())
    assert len(list_inputs([f"{filled}/in/*.png"])) == 6
    assert list(list_inputs([f"{filled}/in/**/*.png"])) == list(found)
    assert read_all(f"{filled}/shards/*.tar") == list(PICTURES.values())
    assert read_all(f"{filled}/tables/a.parquet") == list(PICTURES.values())
    for missing in (f"{filled}/none", f"{filled}/none/*.jpg", "s3://no-such-bucket/in"):
        with pytest.raises(BadSource):
            list_inputs([missing])


def test_a_ledger_in_a_bucket_is_one_in_a_folder(bucket: str, tmp_path: Path) -> None:
    for number, root in enumerate((f"{bucket}/out", str(tmp_path / "out"))):
        first = Ledger.open(root, JOB)
        commit(first, "a", "b", letters=(DeadLetter("c", "decode", "truncated", version="1-2"),))
        second = Ledger.open(root, JOB)
        with pytest.raises(FileNotFoundError):
            commit(first, "z")
        assert second.settle() == {"a": None, "b": None, "c": "1-2"}
        with pytest.raises(OutputMismatch, match="model was m, is n"):
            Ledger.open(root, JOB | {"model": "n"})
        second.finish({"inputs": 3})
        assert second.storage.names() == ["detections", "errors.jsonl", "job.json", "summary.json"], number
        assert Ledger.open(root, JOB | {"model": "n"}, fresh=True).committed() == set()


def test_an_input_that_is_forgotten_is_computed_again_and_the_others_stay(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, JOB)
    commit(ledger, "a", "b", letters=(DeadLetter("c", "decode", "truncated"), DeadLetter("d", "read", "gone")))
    commit(ledger, "e")
    ledger.forget(["c", "a", "e"])
    assert ledger.committed() == {"b", "d"}
    (manifest,) = ledger.manifests()
    assert (manifest.results, manifest.classes, manifest.stage_ms) == (1, {"gear": 1}, {"decode": 0.75})
    assert [letter.uri for letter in manifest.dead_letters] == ["d"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1), max_size=4), st.sets(st.sampled_from("abcdefgh")))
def test_settling_and_forgetting_leave_every_input_in_one_file_at_most(
    tmp_path_factory: pytest.TempPathFactory, shards: list[set[str]], forgotten: set[str]
) -> None:
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger"), JOB)
    for shard in shards:
        commit(ledger, *sorted(shard)[1:], letters=(DeadLetter(min(shard), "decode", "broken"),))
    everything = set().union(*shards)
    assert ledger.settle().keys() == everything
    assert sum(manifest.inputs for manifest in ledger.manifests()) == len(everything)
    ledger.forget(forgotten)
    assert ledger.committed() == everything - forgotten
    assert sum(manifest.inputs for manifest in ledger.manifests()) == len(everything - forgotten)


def test_a_put_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Storage.at(tmp_path)
    store.lease("lease")
    store.put("kept", b"1", "lease")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OSError, match="taken"):
        store.put("taken", b"2", "lease")
    store.delete("lease")
    assert store.names() == ["kept", "taken"]
    assert store.read("kept") == b"1"
    assert store.read("none") is None
    assert Manifest(0).inputs == 0

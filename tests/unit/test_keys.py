"""The file of API keys and the budgets in it."""

import hashlib
import logging
import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.errors import BadRequest
from actors.settings import ModelSettings
from deploy.keys import BadKeysFile, Budget, KeyFile, fresh_key


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def replace_file(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.rename(path)


def test_a_fresh_key_is_found_by_its_line_and_nothing_else_is(tmp_path: Path) -> None:
    made = {line: key for key, line in map(fresh_key, ("alice", "bob@site-1"))}
    path = tmp_path / "keys"
    path.write_text("# who may ask\n\n" + "".join(f"{line}   # since May\n" for line in made))
    keys = KeyFile(path, None)
    for line, key in made.items():
        found = keys.find(key)
        assert found is not None and found.name == line.split()[0] and found.budget.per_minute is None
        assert key not in path.read_text()
        for wrong in (key[:-1], key + "0", key.upper(), "", hashlib.sha256(key.encode()).hexdigest()):
            assert keys.find(wrong) is None


def test_two_fresh_keys_differ_and_have_the_form_that_ultralytics_settings_keep() -> None:
    keys = {fresh_key("a")[0] for _ in range(50)}
    assert len(keys) == 50
    assert all(len(key) == 43 and key.startswith("ul_") and int(key[3:], 16) for key in keys)


@pytest.mark.parametrize("name", ["", "a b", "#a", "ä", "x" * 65, "-a", "a\nb 00"])
def test_a_name_that_cannot_stand_in_the_file_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="cannot name a key"):
        fresh_key(name)


HASH, OTHER = "a" * 64, "b" * 64
BROKEN = {
    "a key in clear": ("alice ul_0123456789", "line 1"),
    "too many words": (f"alice {HASH} 5 6", "line 1"),
    "no number": (f"\nalice {HASH} fast", "line 2"),
    "zero": (f"alice {HASH} 0", "line 1"),
    "a name twice": (f"alice {HASH}\nalice {OTHER}", "line 2"),
    "a hash twice": (f"alice {HASH}\nbob {HASH.upper()}", "line 2"),
    "nobody": ("# nobody yet\n", "no key"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_line_and_without_its_content(tmp_path: Path, case: str) -> None:
    text, sentence = BROKEN[case]
    (tmp_path / "keys").write_text(text)
    with pytest.raises(BadKeysFile, match=sentence) as caught:
        KeyFile(tmp_path / "keys", None)
    assert "ul_" not in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKeysFile, match="cannot be read"):
        KeyFile(tmp_path / "nowhere", None)


def test_an_edit_counts_within_a_second_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = Clock(), tmp_path / "keys"
    (old, old_line), (new, new_line) = fresh_key("old"), fresh_key("new")
    path.write_text(old_line)
    keys = KeyFile(path, None, clock)

    replace_file(path, new_line)
    clock.now += 0.9
    assert keys.find(old) and not keys.find(new)  # looked at once a second only
    clock.now += 0.2
    assert keys.find(new) and not keys.find(old)

    for broken in ("new 12", None, "a folder"):
        path.unlink(missing_ok=True)
        if broken == "a folder":
            path.mkdir()
        elif broken:
            path.write_text(broken)
        caplog.clear()
        for _ in range(3):
            clock.now += 2
            assert keys.find(new)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]  # told once, not every second

    path.rmdir()
    replace_file(path, "# all are revoked\n")
    clock.now += 2
    assert not keys.find(new)


def test_no_log_has_a_key_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    clock, path = Clock(), tmp_path / "keys"
    key, line = fresh_key("a")
    path.write_text(line)
    keys = KeyFile(path, None, clock)
    for text in (f"{line}\nb {key}", line):
        replace_file(path, text)
        clock.now += 2
        assert keys.find(key)
    assert len(caplog.records) == 2 and key not in caplog.text


def test_a_budget_survives_an_edit_elsewhere_in_the_file_and_not_an_edit_of_its_own(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys"
    key, line = fresh_key("a")
    path.write_text(f"{line} 1")
    keys = KeyFile(path, 1, clock)

    def wait() -> float:
        clock.now += 2
        found = keys.find(key)
        assert found is not None
        return found.budget.take()

    assert wait() == 0 and wait() > 50
    replace_file(path, f"{line} 1\n{fresh_key('b')[1]}")
    assert wait() > 50
    replace_file(path, f"{line} 2")
    assert wait() == 0


def test_the_default_rate_is_for_lines_without_one(tmp_path: Path) -> None:
    made = [fresh_key(name) for name in ("a", "b")]
    (tmp_path / "keys").write_text(f"{made[0][1]}\n{made[1][1]} 7")
    keys = KeyFile(tmp_path / "keys", 3)
    assert [found.budget.per_minute for key, _ in made if (found := keys.find(key))] == [3, 7]


@given(st.integers(1, 5000), st.floats(0, 1e6))
@example(1, 0.38)  # a sum of floats that once took a 61st second
def test_a_full_budget_is_a_minutes_worth_and_retry_after_is_exact(per_minute: int, start: float) -> None:
    clock = Clock()
    clock.now += start
    budget = Budget(per_minute, clock)
    assert [budget.take() for _ in range(per_minute)] == [0.0] * per_minute
    wait_s = math.ceil(budget.take())
    assert wait_s == math.ceil(60 / per_minute)
    clock.now += wait_s - 1
    if wait_s > 1:
        assert budget.take() > 0  # a second earlier is too early, and asking costs nothing
    clock.now += 1
    assert budget.take() == 0


@given(st.integers(1, 600), st.lists(st.floats(0, 20), max_size=200))
def test_whatever_the_rhythm_a_budget_gives_one_minutes_worth_and_what_grows_back(
    per_minute: int, pauses: list[float]
) -> None:
    clock = Clock()
    budget = Budget(per_minute, clock)
    accepted: list[float] = []
    for pause in pauses:
        clock.now += pause
        if budget.take() == 0:
            accepted.append(clock.now)
    elapsed = clock.now - 1000
    assert len(accepted) <= per_minute * (1 + elapsed / 60) + 1e-6


@pytest.mark.parametrize(("flag", "name"), [(f"a=x.pt@sha256:{'AB' * 32}", "a"), (f"dir/x.pt@sha256:{'ab' * 32}", "x")])
def test_a_model_flag_can_pin_its_weights(flag: str, name: str) -> None:
    model = ModelSettings.from_flag(flag)
    assert (model.name, model.weights.rpartition("/")[2], model.sha256) == (name, "x.pt", "ab" * 32)


@pytest.mark.parametrize("pin", ["", "ab", "g" * 64])
def test_a_pin_that_is_no_hash_is_refused(pin: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        ModelSettings.from_flag(f"a=x.pt@sha256:{pin}")

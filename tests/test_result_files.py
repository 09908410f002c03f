"""Result files of the benchmarks: parts of one machine's day come together, another machine's stay apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import common
from common import with_todays, write_result


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    facts: dict[str, object] = {"processor": "one", "memory_gib": 1.23456789}
    monkeypatch.setattr(common, "machine", lambda: dict(facts))
    monkeypatch.setattr(common, "versions", lambda: {"torch": "1.0", "commit": "abc"})
    return facts


def test_other_versions_of_packages_have_a_file_of_their_own(
    tmp_path: Path, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_result("speed", {"settings": None, "models": {"a": 1}}, tmp_path)
    monkeypatch.setattr(common, "versions", lambda: {"torch": "1.0", "commit": "def"})
    assert with_todays("speed", "models", {"b": 2}, None, tmp_path) == {"a": 1, "b": 2}
    monkeypatch.setattr(common, "versions", lambda: {"torch": "2.0", "commit": "def"})
    assert with_todays("speed", "models", {"b": 2}, None, tmp_path) == {"b": 2}
    assert write_result("speed", {"settings": None, "models": {"b": 2}}, tmp_path) != first


def test_a_second_machine_takes_nothing_from_the_first(tmp_path: Path, machine: dict[str, object]) -> None:
    first = write_result("speed", {"settings": None, "models": {"a": 1}}, tmp_path)
    machine["processor"] = "other"
    assert with_todays("speed", "models", {"b": 2}, None, tmp_path) == {"b": 2}
    second = write_result("speed", {"settings": None, "models": {"b": 2}}, tmp_path)
    assert sorted(tmp_path.iterdir()) == [first, second], "the newer one comes last"
    assert json.loads(first.read_text())["models"] == {"a": 1}
    for processor, path, known in (("one", first, {"a": 1}), ("other", second, {"b": 2})):
        machine["processor"] = processor
        assert with_todays("speed", "models", {"c": 3}, None, tmp_path) == {**known, "c": 3}
        assert with_todays("speed", "models", {"c": 3}, {"budget": 1}, tmp_path) == {"c": 3}
        assert write_result("speed", {"settings": None, "models": known}, tmp_path) == path


def test_records_of_an_earlier_day_are_carried_on_with_their_date(
    tmp_path: Path, machine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "today", lambda: "2026-01-01")
    records = {"a": {"x": 1}, "b": {"x": 2, "date": "2025-12-31"}, "c": {"x": 3}}
    earlier = write_result("speed", {"settings": None, "models": records}, tmp_path)
    monkeypatch.setattr(common, "today", lambda: "2026-01-02")
    new = {"c": {"x": 4}}
    known = with_todays("speed", "models", new, None, tmp_path, earlier=earlier)
    assert known == {"a": {"date": "2026-01-01", "x": 1}, "b": {"date": "2025-12-31", "x": 2}, "c": {"x": 4}}
    write_result("speed", {"settings": None, "models": known}, tmp_path)
    assert with_todays("speed", "models", {}, None, tmp_path, earlier=earlier) == known, "today's come first"
    machine["processor"] = "other"
    with pytest.raises(ValueError, match=r"speed-2026-01-01\.json is of another machine"):
        with_todays("speed", "models", new, None, tmp_path, earlier=earlier)

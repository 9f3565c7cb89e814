"""The figures of docs/fewer-evaluations.md: its tables are those of the record, and one command makes both."""

import copy
import json
import re
import sys

import pytest

from fastprior.serving import prior_sampler
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
for package in ("accelerate", "matplotlib", "sklearn", "pandas"):
    pytest.importorskip(package, reason="is in the test extra")
import fewer_evaluations as page  # noqa: E402


@pytest.fixture(scope="module")
def record():
    return json.loads(page.RECORD.read_text(encoding="utf-8"))


@pytest.fixture
def small(monkeypatch):
    """All of `Size` as it was, whatever the command makes of it."""
    kept = {name: value for name, value in vars(page.Size).items() if not name.startswith("_")}
    yield
    for name, value in kept.items():
        setattr(page.Size, name, value)


def test_the_tables_of_the_page_are_those_of_the_record(record):
    text = page.PAGE.read_text(encoding="utf-8")
    tables = page.tables_of(record)
    assert set(re.findall(r"<!-- begin (\w+) -->", text)) == set(tables)
    assert page.filled(text, tables) == text
    for name in record["quality"]:
        assert f"{page.PAGE.stem}-{name}.png" in text and page.PAGE.with_name(f"{page.PAGE.stem}-{name}.png").exists()


def test_a_figure_that_is_not_the_record_s_is_found(record):
    other = copy.deepcopy(record)
    other["quality"]["digits"][3]["distance"] += 1
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.tables_of(other)) != text


def test_the_default_is_the_fewest_evaluations_that_cost_nothing(record):
    assert prior_sampler.EVALUATIONS == max(page.enough(rows) for rows in record["quality"].values())
    assert set(record["quality"]) == {"digits", "synthetic", "transformer"}
    for rows in record["quality"].values():
        assert {row["cond_scale"] for row in rows} == {1, 2, 3}


@pytest.mark.parametrize("distances, wanted", [
    ({8: 5.0, 10: 4.9, 12: 3, 14: 3, 16: 3}, 8), ({8: 5.1, 10: 4, 12: 5.2, 14: 3, 16: 3}, 10),
    ({8: 9, 10: 9, 12: 9, 14: 9, 16: 9}, None),
])  # fmt: skip
def test_enough_is_no_worse_than_ddim_and_chance(distances, wanted):
    def row(way, evaluations, distance):
        return dict(cond_scale=1.0, way=way, evaluations=evaluations, distance=distance, error=1.5)

    rows = [row("ddpm", 1000, 0.1), row("ddim", 63, 3.5)]
    rows += [row("sde-dpm++:logsnr", count, distance) for count, distance in distances.items()]
    assert page.enough(rows) == wanted


def test_enough_is_enough_at_every_scale():
    def rows(scale, distances):
        runs = [("ddpm", 1000, 0.1), ("ddim", 63, 4.0), *(("sde-dpm++:logsnr", *pair) for pair in distances.items())]
        return [dict(cond_scale=scale, way=w, evaluations=n, distance=d, error=1.0) for w, n, d in runs]

    assert page.enough(rows(1.0, {8: 4, 12: 3, 16: 2}) + rows(2.0, {8: 6, 12: 5, 16: 2})) == 12


@pytest.mark.slow
def test_the_command(small, tmp_path, capsys):
    record, text = tmp_path / "record.json", tmp_path / "page.md"
    text.write_text(re.sub(r"(-->\n).*?(<!-- end)", r"\1\2", page.PAGE.read_text(encoding="utf-8"), flags=re.S))
    assert page.main(["--quick", "--record", str(record), "--page", str(text)]) == 0
    made = json.loads(record.read_text(encoding="utf-8"))
    assert page.filled(text.read_text(encoding="utf-8"), page.tables_of(made)) == text.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for name in ("digits", "synthetic", "transformer"):
        assert (tmp_path / f"page-{name}.png").stat().st_size > 10_000
        assert re.search(f"^{name}: .* evaluations are enough$", printed, flags=re.M)
    before = copy.deepcopy(made)
    assert page.main(["--quick", "--only", "timing", "--record", str(record)]) == 0
    made = json.loads(record.read_text(encoding="utf-8"))
    for row, old in zip(made["quality"]["digits"], before["quality"]["digits"], strict=True):
        assert row["milliseconds"] != old["milliseconds"] and row["distance"] == old["distance"]

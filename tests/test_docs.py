"""Tables in Markdown files are those of the results they name."""

import json
import shutil
from pathlib import Path

import pytest

from fastar.results.card import evaluation_page
from scripts import speed_tables
from scripts.include import filled

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "outputs" for part in page.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_included_tables_are_current(page: Path) -> None:
    assert filled(page) == page.read_text(), f"run: python scripts/include.py {page}"


@pytest.mark.parametrize(
    "results", sorted(ROOT.glob("checkpoints/*/results/")), ids=lambda folder: folder.parent.name
)
def test_model_cards_show_what_was_measured(results: Path) -> None:
    page = results.parent / "README.md"
    text = page.read_text()
    assert "<!-- include results/backbone.md -->" in text
    rows = [json.loads(line) for line in (results / "backbone.jsonl").read_text().splitlines()]
    assert (results / "backbone.md").read_text() == evaluation_page(rows)
    assert not [picture.name for picture in results.glob("*.png") if f"](results/{picture.name})" not in text]


def test_tables_of_speed_are_those_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = speed_tables.SPEED
    for record in (*kept.glob("*.json"), *kept.glob("*.jsonl")):
        shutil.copy(record, tmp_path)
    monkeypatch.setattr(speed_tables, "SPEED", tmp_path)
    for make in speed_tables.TABLES:
        make()
    made, there = (
        {page.name: page.read_text() for page in folder.glob("*.md")} for folder in (tmp_path, kept)
    )
    assert made == there, "run: python scripts/speed_tables.py"


def test_every_method_is_recorded_on_every_loop() -> None:
    """But for what analysis/README.md names."""
    nowhere, once = {"tempcache_paper_error"}, {"dense_reference", "ranked_faiss"}
    methods = {path.stem for path in (ROOT / "conf/method").glob("*.yaml")} - nowhere
    words = {name for name in methods if name.startswith(("annca", "ranked"))} | {
        "dense_merged",
        "random_tokens",
    }
    found: dict[tuple[str, str], set[str]] = {}
    for record in speed_tables.SPEED.glob("loops*.json"):
        for row in json.loads(record.read_text())["rows"]:
            found.setdefault((row["backbone"], row["loop"]), set()).add(row["method"])
    assert found.pop(("wan_14b", "self_forcing")) == {"dense"}
    assert found.pop(("matrix_game_2", "matrix_game_2")) == methods - words - once | {"annca"}
    assert found.pop(("wan_1_3b", "self_forcing")) == methods
    assert set(found) == {
        ("wan_1_3b", loop)
        for loop in ("causvid", "longlive", "longlive_infinity", "rolling_forcing", "diffusion_forcing")
    } | {("skyreels_v2_df_1_3b", "diffusion_forcing")}
    for where, there in found.items():
        assert there == methods - once, where


def test_blocks_are_filled_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("| a |\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- include table.md -->\nold\n<!-- end -->\nbetween <!-- end -->\n")
    assert filled(page) == "before\n<!-- include table.md -->\n| a |\n<!-- end -->\nbetween <!-- end -->\n"
    page.write_text("<!-- include none.md -->\n<!-- end -->\n")
    with pytest.raises(FileNotFoundError, match=r"includes none.md, which is not there"):
        filled(page)

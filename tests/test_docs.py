"""Tables in Markdown files are those of the results they name."""

import json
from pathlib import Path

import pytest

from fastar.results.card import evaluation_page
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


def test_blocks_are_filled_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("| a |\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- include table.md -->\nold\n<!-- end -->\nbetween <!-- end -->\n")
    assert filled(page) == "before\n<!-- include table.md -->\n| a |\n<!-- end -->\nbetween <!-- end -->\n"
    page.write_text("<!-- include none.md -->\n<!-- end -->\n")
    with pytest.raises(FileNotFoundError, match=r"includes none.md, which is not there"):
        filled(page)

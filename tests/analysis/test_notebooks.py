"""The notebooks of analysis/ run on the recorded results and are paired with their scripts."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from fastar.results import figures, speed

ANALYSIS = Path(__file__).resolve().parents[2] / "analysis"
FIGURES, TABLES = sorted(ANALYSIS.glob("figure_*.py")), sorted(ANALYSIS.glob("table_*.py"))
SCRIPTS = [*FIGURES, *TABLES]


def cells_of(script: Path) -> list[tuple[str, str]]:
    """Kind and source of each cell of a script in percent format."""
    cells = []
    for part in script.read_text().split("\n# %%")[1:]:
        first, _, rest = part.partition("\n")
        kind = "markdown" if "[markdown]" in first else "code"
        lines = rest.strip("\n").split("\n")
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append((kind, "\n".join(lines)))
    return cells


def test_there_are_notebooks() -> None:
    assert len(FIGURES) >= 7 and len(TABLES) >= 4


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_paired_with_its_script(script: Path) -> None:
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == cells_of(script), "run scripts/figures.py --pair"
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.parametrize("script", FIGURES, ids=lambda path: path.stem)
def test_a_notebook_draws_its_figure_from_the_recorded_results(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    runpy.run_path(str(script))
    with Image.open(tmp_path / f"{script.stem}.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=2**20)
    assert colours is not None and len(colours) > 8 and max(colours)[0] < 0.97 * sum(n for n, _ in colours)
    assert (tmp_path / f"{script.stem}.pdf").read_bytes().startswith(b"%PDF")
    told = capsys.readouterr().out
    assert all(word in told for word in ("backbone ", "seeds", "hardware", "torch"))


@pytest.mark.parametrize("script", TABLES, ids=lambda path: path.stem)
def test_a_notebook_writes_its_table_from_the_recorded_results(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "read_speed" in script.read_text() and not speed.RECORD.exists():
        pytest.skip(f"needs {speed.RECORD.relative_to(ANALYSIS)}, which is recorded on a GPU")
    monkeypatch.setattr(figures, "TABLES", tmp_path)
    runpy.run_path(str(script))
    kept = ANALYSIS / "tables" / f"{script.stem}.md"
    assert (tmp_path / kept.name).read_text() == kept.read_text(), "run scripts/figures.py"

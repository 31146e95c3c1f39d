"""Rebuild the figures and tables of analysis/: run its notebooks, each in a kernel of its own. `make figures` does it.

    python scripts/figures.py            # run all; writes analysis/figures/*.png and *.pdf, analysis/tables/*.md
    python scripts/figures.py --pair     # after a change to a .py: write its .ipynb anew

A notebook is a .py in percent format and an .ipynb of the same cells, without outputs; people edit the .py. Needs the
extra `analysis`.
"""

import argparse
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ANALYSIS = Path(__file__).resolve().parent.parent / "analysis"


def pair(script: Path) -> None:
    """Write the notebook of a script, with ids that do not change by themselves."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def execute(path: Path) -> float:
    """Run a notebook; seconds it took. An error in a cell ends the program with its traceback."""
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ANALYSIS)}}).execute()
    return time.perf_counter() - started


def main() -> None:
    """Pair or execute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", action="store_true", help="write the .ipynb of every .py")
    arguments = parser.parse_args()
    for script in sorted([*ANALYSIS.glob("figure_*.py"), *ANALYSIS.glob("table_*.py")]):
        if arguments.pair:
            pair(script)
        else:
            print(f"{script.stem}: {execute(script.with_suffix('.ipynb')):.1f} s")


if __name__ == "__main__":
    main()

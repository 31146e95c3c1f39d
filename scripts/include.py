"""Fill the tables of Markdown files from the files that they name: numbers in a text are never typed.

    python scripts/include.py README.md checkpoints/*/README.md

What stands between `<!-- include PATH -->` and `<!-- end -->` is replaced by the text of PATH, a path relative to the
Markdown file.
"""

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- include (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: Path) -> str:
    """The text of `page` with its blocks filled.

    Raises:
        FileNotFoundError: a file that the page names is not there.
    """

    def fill(block: re.Match[str]) -> str:
        source = page.parent / block[2]
        if not source.is_file():
            raise FileNotFoundError(
                f"{page} includes {block[2]}, which is not there: make it or change the line"
            )
        return f"{block[1]}{source.read_text().strip()}\n{block[3]}"

    return BLOCK.sub(fill, page.read_text())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(filled(Path(name)))

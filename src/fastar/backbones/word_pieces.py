"""How the frozen text encoder reads a sentence: MiniLM's word pieces, whole or cut to a list of words.

The tokenizer is that of `transformers`, imported when one is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import groupby
from string import ascii_lowercase, digits, punctuation
from typing import Any

UNKNOWN = "[UNK]"
SPECIALS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = ascii_lowercase + digits + punctuation  # every cut knows them, each as a word of its own
PIECES, WORDS = "vocab.txt", "words.txt"  # files of a cut


class WordPieces:
    """Splits sentences into word pieces, and names the word that it does not know.

    Args:
        pieces: in the order of their numbers.
        words: all that a sentence may hold beside single pieces, lower case; None: whatever the pieces can spell.
        positions: tokens of the longest sentence, [CLS] and [SEP] included.

    Raises:
        ValueError: transformers is not installed.
    """

    def __init__(
        self, pieces: Sequence[str], words: Collection[str] | None = None, *, positions: int
    ) -> None:
        transformers = import_transformers()
        self.pieces, self.positions = tuple(pieces), positions
        self.words = None if words is None else frozenset(words)
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}
        tokenizer = transformers.BertTokenizerFast(vocab=self.numbers, do_lower_case=True)
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.encode_special_tokens = True  # a "[SEP]" in a sentence is text like any other

    def split(self, sentence: str) -> Any:
        """The `tokenizers.Encoding` of a sentence whose words are all known.

        Raises:
            ValueError: a word is not, or the sentence has more than `positions` tokens.
        """
        encoding = self._tokenizer.encode(sentence)
        for word, (start, stop) in _words_of(encoding):
            known = self.words is None or word in self.words or word in self.numbers
            if word == UNKNOWN or not known:
                raise ValueError(self._unknown(sentence[start:stop]))
        if len(encoding) > self.positions:
            raise ValueError(
                f"a sentence has {len(encoding)} tokens and the text encoder takes {self.positions}: split "
                f"{sentence[:60]!r}..."
            )
        return encoding

    def needed(self, words: Iterable[str]) -> tuple[list[str], set[str]]:
        """The pieces of `words`, of single characters and of special tokens, in order, and the words themselves.

        Raises:
            ValueError: a word that is not known.
        """
        kept = set(CHARACTERS) & self.numbers.keys()
        known: set[str] = set()
        for entry in words:
            encoding = self.split(entry)
            kept.update(encoding.tokens[1:-1])
            known.update(word for word, _ in _words_of(encoding))
        return [*SPECIALS, *sorted(kept - set(SPECIALS))], known

    def _unknown(self, word: str) -> str:
        if self.words is None:
            return f"the text encoder has no word pieces for {word!r}: use other words"
        near = get_close_matches(word.lower(), self.words, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"see its {WORDS}"
        return f"the text encoder was cut to {len(self.words)} words and {word!r} is none of them; {hint}"


def _words_of(encoding: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """The words of a `tokenizers.Encoding` as its pieces spell them, with their characters; not [CLS], [SEP]."""
    tokens = list(zip(encoding.word_ids, encoding.tokens, encoding.offsets, strict=True))[1:-1]
    for _, group in groupby(tokens, key=lambda token: token[0]):
        pieces = list(group)
        spelt = pieces[0][1] + "".join(piece.removeprefix("##") for _, piece, _ in pieces[1:])
        yield spelt, (pieces[0][2][0], pieces[-1][2][1])


def import_transformers() -> Any:
    """The module, imported late: it is an optional package. Raises a ValueError if it is missing."""
    try:
        import transformers
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the text encoder needs transformers ({reason}): pip install -e '.[text]'"
        ) from error
    return transformers

"""Wan's text encoder: the UMT5 of transformers, whose embeddings are kept on disk.

It has four times the parameters of the 1.3B transformer that reads them, so it is loaded only if some prompt has not
been encoded before, and let go afterwards. As in Wan: prompts are cleaned, cut to `length` tokens and masked inside the
encoder; nothing behind their end is kept, which the transformer then fills with zeros.
"""

from __future__ import annotations

import gc
import hashlib
import html
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastar.backbones.pretrained import checksum, read_tensors, write_whole
from fastar.backbones.prompts import Prompts
from fastar.backbones.resolve import Weights, find_weights

log = logging.getLogger(__name__)

LENGTH = 512  # tokens that Wan reads
PART, USUAL = "text_encoder", ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZERS = (
    "tokenizer",
    "google/umt5-xxl",
    ".",
)  # where it lies beside the encoder: diffusers, the original, ours

# UMT5-XXL, for files that come without a config.
XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip

# (the original file's name, transformers' name)
NAMES = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)


class PromptEncoder:
    """Prompts to embeddings of their tokens, from disk where they have been encoded before.

    Args:
        checkpoint: path or hub id (`fastar.backbones.resolve`) of the encoder: a diffusers folder, whose tokenizer lies
            in its part `tokenizer`, or the original models_t5_umt5-xxl-enc-bf16.pth, with google/umt5-xxl beside it.
        tokenizer: folder of the tokenizer, where it lies elsewhere.
        length: tokens of a prompt at most; None: Wan's.
        device, dtype: where and in what to encode; `auto`: CUDA if there is one.
        store: folder where checkpoints are put.
        cache: folder for embeddings and checksums; None: nothing is kept.

    Raises:
        FileNotFoundError, ValueError: no such encoder or tokenizer.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        tokenizer: str | Path | None = None,
        length: int | None = LENGTH,
        device: torch.device | str = "auto",
        dtype: str = "bfloat16",
        store: str | Path = "checkpoints",
        cache: str | Path | None = None,
    ) -> None:
        self.found = find_weights(
            checkpoint, part=PART, usual=USUAL, store=store, beside=[f"{name}/*" for name in TOKENIZERS[:2]]
        )
        self.tokenizer = _tokenizer_folder(self.found, tokenizer)
        self.length, self.dtype = LENGTH if length is None else length, dtype
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.cache = None if cache is None else Path(cache)
        self._held: dict[str, Tensor] = {}  # without a cache
        files = [file for file in sorted(self.tokenizer.iterdir()) if _of_tokenizer(file)]
        sums = [checksum(self.found.files, cache), checksum(files, cache), dtype]
        self.sha256 = hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def encode(self, prompts: Sequence[str]) -> Prompts:
        """Embeddings [B, L, width] of `prompts` in the encoder's dtype, on the CPU, L the tokens of the longest.

        Raises:
            ValueError: the encoder is damaged or does not fit, or transformers or ftfy is missing.
        """
        self.prepare(prompts)
        found = [self._read(clean(prompt)) for prompt in prompts]
        lengths = torch.tensor([len(rows) for rows in found])
        return Prompts(torch.nn.utils.rnn.pad_sequence(found, batch_first=True), lengths)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode those of `prompts` that have not been, so that `encode` finds all of them; errors as there.

        Memory is that of the encoder, and without a cache that of their embeddings.
        """
        missing = [text for text in dict.fromkeys(map(clean, prompts)) if not self._has(text)]
        if missing:
            self._encode_all(missing)

    # -- the cache -----------------------------------------------------------------------------------------------------

    def file_of(self, text: str) -> Path | None:
        """Where the embeddings of a cleaned prompt are kept: named by it, the encoder and the length."""
        if self.cache is None:
            return None
        key = hashlib.sha256(json.dumps([text, self.sha256, self.length]).encode()).hexdigest()
        return self.cache / "prompts" / f"{key[:40]}.safetensors"

    def _has(self, text: str) -> bool:
        file = self.file_of(text)
        if file is None or not file.exists():
            return text in self._held
        try:
            self._read(text)
        except (SafetensorError, OSError, ValueError):
            log.warning("%s is damaged: its prompt is encoded again", file)
            return False
        return True

    def _read(self, text: str) -> Tensor:
        file = self.file_of(text)
        if file is None:
            return self._held[text]
        with safe_open(file, framework="pt") as opened:
            rows: Tensor = opened.get_tensor("embeddings").clone()
            prompt = (opened.metadata() or {}).get("prompt")
        if prompt != text or rows.ndim != 2 or not 1 <= len(rows) <= self.length or not rows.isfinite().all():
            raise ValueError(f"{file} does not hold the embeddings of its prompt: remove it")
        return rows

    def _keep(self, text: str, rows: Tensor) -> None:
        file = self.file_of(text)
        if file is None:
            self._held[text] = rows
        else:
            write_whole(file, save({"embeddings": rows.contiguous()}, metadata={"prompt": text}))

    # -- the encoder ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encode_all(self, texts: Sequence[str]) -> None:
        """Keep the embeddings [tokens, width] of each text: the encoder comes and goes."""
        transformers = _transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer, local_files_only=True)
        network = self._network(transformers)
        for text in texts:
            numbers = tokenizer(text, add_special_tokens=True, return_tensors="pt").input_ids
            if numbers.shape[1] > self.length:
                log.warning(
                    "a prompt of %d tokens is cut to %d: %.60s...", numbers.shape[1], self.length, text
                )
            padded = tokenizer(
                text, padding="max_length", max_length=self.length, truncation=True, add_special_tokens=True,
                return_attention_mask=True, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            states = network(
                input_ids=padded.input_ids, attention_mask=padded.attention_mask
            ).last_hidden_state
            self._keep(text, states[0, : int(padded.attention_mask.sum())].cpu().clone())
        del network, states
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _network(self, transformers: Any) -> Any:
        """The encoder on its device, in its dtype."""
        file, sizes = self.found.files[0], XXL
        if self.found.config is not None:
            sizes = json.loads(self.found.config.read_text(encoding="utf-8"))
        tensors = read_tensors(self.found.files)
        if "token_embedding.weight" in tensors:
            tensors = {_renamed(name, file): tensor for name, tensor in tensors.items()}
        with torch.device("meta"):
            network = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
        names = network.state_dict()
        # one table under two names: files hold either or both
        words = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
        given = tensors | {
            name: words for name in ("shared.weight", "encoder.embed_tokens.weight") if name in names
        }
        wrong = [
            name
            for name, tensor in names.items()
            if given.get(name) is None or given[name].shape != tensor.shape
        ]
        if wrong:
            raise ValueError(
                f"{file} does not hold the UMT5 encoder of {self.found.config or 'the size XXL'}: {len(wrong)} tensors "
                f"are missing or of another shape, {wrong[0]} first"
            )
        dtype = getattr(torch, self.dtype)
        network.load_state_dict({name: given[name].to(self.device, dtype) for name in names}, assign=True)
        network.tie_weights()
        return network.requires_grad_(False).eval()


def clean(prompt: str) -> str:
    """A prompt as Wan cleans it: broken characters mended (ftfy), HTML entities resolved twice, white space collapsed.

    Raises:
        ValueError: it holds what ftfy may change, which is nothing printable in ASCII but `&`, and ftfy is missing.
    """
    plain = " ".join(prompt.split())
    if plain.isascii() and plain.isprintable() and "&" not in plain:
        return plain
    try:
        import ftfy
    except ImportError as error:
        raise ValueError(
            f"the prompt {prompt[:40]!r}... has characters that Wan cleans with ftfy: pip install -e '.[wan]'"
        ) from error
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def _renamed(name: str, file: Path) -> str:
    for pattern, theirs in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs)
    raise ValueError(f"{file} holds {name}, which is no part of Wan's text encoder: give another file")


def _tokenizer_folder(found: Weights, given: str | Path | None) -> Path:
    """The folder of the tokenizer: the one that is given, or one beside the encoder."""
    beside = (found.folder, found.folder.parent)
    folders = (
        [Path(given)] if given is not None else [place / name for name in TOKENIZERS for place in beside]
    )
    for folder in folders:
        if folder.is_dir() and any(_of_tokenizer(file) for file in folder.iterdir()):
            return folder
    where = f"in {given}" if given is not None else f"beside {found.files[0]} ({', '.join(TOKENIZERS[:2])})"
    raise FileNotFoundError(
        f"there is no tokenizer {where}: download that of google/umt5-xxl and name its folder"
    )


def _of_tokenizer(file: Path) -> bool:
    return file.name in TOKENIZER_FILES


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Wan's text encoder needs transformers ({reason}): pip install -e '.[wan]'"
        ) from error
    return transformers

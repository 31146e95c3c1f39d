"""Wan's image encoder: the CLIP ViT-H of transformers, whose tokens of an image are kept on disk.

Wan I2V and Matrix-Game 2.0 attend to what the second last block makes of the first frame: 257 tokens, 1280 wide. It is
loaded only if some image has not been encoded before, and let go afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fastar.backbones.pretrained import checksum, read_tensors, write_whole
from fastar.backbones.resolve import find_weights

log = logging.getLogger(__name__)

PART, USUAL = "image_encoder", ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.*",)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# ViT-H/14, for files that come without a config.
VIT_H = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip

# (the original file's name behind `visual.`, transformers' name behind `vision_model.`)
NAMES = (
    (r"cls_embedding", "embeddings.class_embedding"),
    (r"patch_embedding\.weight", "embeddings.patch_embedding.weight"),
    (r"pos_embedding", "embeddings.position_embedding.weight"),
    (r"pre_norm\.(weight|bias)", r"pre_layrnorm.\1"),
    (r"transformer\.(\d+)\.norm([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.(\d+)\.mlp\.0\.(weight|bias)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.(\d+)\.mlp\.2\.(weight|bias)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"post_norm\.(weight|bias)", r"post_layernorm.\1"),
)
JOINED = re.compile(r"transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)")
OURS, THEIRS = "visual.", "vision_model."


class ImageEncoder:
    """Images to tokens, from disk where they have been encoded before.

    Args:
        checkpoint: path or hub id (`fastar.backbones.resolve`): a diffusers folder, or the original
            models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, whose text encoder is left alone.
        device, dtype: where and in what to encode; `auto`: CUDA if there is one.
        store: folder where checkpoints are put.
        cache: folder for tokens and checksums; None: nothing is kept.

    Raises:
        FileNotFoundError, ValueError: no such encoder.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: torch.device | str = "auto",
        dtype: str = "float32",
        store: str | Path = "checkpoints",
        cache: str | Path | None = None,
    ) -> None:
        self.found = find_weights(checkpoint, part=PART, usual=USUAL, store=store)
        self.dtype = dtype
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.cache = None if cache is None else Path(cache)
        sums = [checksum(self.found.files, cache), dtype]
        self.sha256 = hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [B, S, width] float32, on the CPU, of uint8 images [B, H, W, 3].

        Raises:
            ValueError: the encoder is damaged or does not fit, or transformers is missing.
        """
        found = [self._read(image) for image in images]
        missing = [number for number, tokens in enumerate(found) if tokens is None]
        if missing:
            for number, tokens in zip(missing, self._encode_all(images[missing]), strict=True):
                found[number] = tokens
                if (file := self.file_of(images[number])) is not None:
                    write_whole(file, save({"tokens": tokens.contiguous()}))
        return torch.stack([tokens for tokens in found if tokens is not None])

    def file_of(self, image: Tensor) -> Path | None:
        """Where the tokens of an image [H, W, 3] are kept: named by its pixels and the encoder."""
        if self.cache is None:
            return None
        key = hashlib.sha256(json.dumps([list(image.shape), self.sha256]).encode())
        key.update(image.contiguous().numpy().tobytes())
        return self.cache / "images" / f"{key.hexdigest()[:40]}.safetensors"

    def _read(self, image: Tensor) -> Tensor | None:
        file = self.file_of(image)
        if file is None or not file.exists():
            return None
        try:
            tokens = load_file(file)["tokens"]
        except (SafetensorError, OSError, KeyError):
            log.warning("%s is damaged: its image is encoded again", file)
            return None
        return tokens if tokens.ndim == 2 and bool(tokens.isfinite().all()) else None

    @torch.no_grad()
    def _encode_all(self, images: Tensor) -> Tensor:
        """The encoder comes and goes."""
        network = self._network()
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        side = network.config.image_size
        # as Wan does: the whole picture squeezed into a square, whatever its sides
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False) / 2 + 0.5
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, STD))
        pixels = ((pixels - mean) / std).to(getattr(torch, self.dtype))
        return network(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].float().cpu()

    def _network(self) -> Any:
        """The encoder on its device, in its dtype."""
        transformers, file, sizes = _transformers(), self.found.files[0], VIT_H
        if self.found.config is not None:
            sizes = json.loads(self.found.config.read_text(encoding="utf-8"))
        held = read_tensors(self.found.files)
        given = to_transformers_names(held) if any(name.startswith(OURS) for name in held) else held
        given = {name.removeprefix(THEIRS): tensor for name, tensor in given.items()}
        with torch.device("meta"):
            network = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
        state = network.state_dict()
        own = {name: name.removeprefix(THEIRS) for name in state}
        wrong = [
            n for n, tensor in state.items() if getattr(given.get(own[n]), "shape", None) != tensor.shape
        ]
        if wrong:
            raise ValueError(
                f"{file} does not hold the CLIP image encoder of {self.found.config or 'the size ViT-H'}: {len(wrong)} "
                f"tensors are missing or of another shape, {wrong[0]} first"
            )
        dtype = getattr(torch, self.dtype)
        network.load_state_dict({n: given[own[n]].to(self.device, dtype) for n in state}, assign=True)
        for module in network.modules():
            if (places := module._buffers.get("position_ids")) is not None:  # no weights: in no file
                module.position_ids = torch.arange(places.shape[-1], device=self.device)[None]
        return network.requires_grad_(False).eval()


def to_transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image part of Wan's original file under transformers' names: queries, keys and values apart.

    Raises:
        ValueError: a tensor of it that is no part of a ViT.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (
            not name.startswith(OURS) or name == f"{OURS}head"
        ):  # the text encoder, and what follows the last block
            continue
        part = name.removeprefix(OURS)
        if match := JOINED.fullmatch(part):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"] = third
            continue
        theirs = next((m.expand(to) for pattern, to in NAMES if (m := re.fullmatch(pattern, part))), None)
        if theirs is None:
            raise ValueError(f"{name} is no part of Wan's image encoder: give another file")
        renamed[theirs] = tensor.flatten() if part == "cls_embedding" else tensor
        if part == "pos_embedding":
            renamed[theirs] = tensor.squeeze(0)
    return renamed


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Wan's image encoder needs transformers ({reason}): pip install -e '.[wan]'"
        ) from error
    return transformers

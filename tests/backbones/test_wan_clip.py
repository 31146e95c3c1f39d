"""Wan's image encoder: which tokens it makes of images, under both namings, and when it is loaded at all."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from fastar.backbones.wan import clip
from fastar.backbones.wan.clip import MEAN, STD, ImageEncoder
from tests.wan_parts import write_image_encoder

ORIGINAL = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPVisionModel]:
    """A diffusers folder, and the encoder in it."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, write_image_encoder(folder)


def encoder(folder: Path, cache: Path | None = None, **options: Any) -> ImageEncoder:
    return ImageEncoder(folder, cache=cache, **{"device": "cpu"} | options)


def images(number: int = 2) -> Tensor:
    return torch.randint(256, (number, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@torch.no_grad()
def blocks_of(network: CLIPVisionModel, pixels: Tensor, blocks: int) -> Tensor:
    """Tokens after so many blocks, block by block."""
    inner = getattr(network, "vision_model", network)
    hidden = inner.pre_layrnorm(inner.embeddings(pixels))
    for block in inner.encoder.layers[:blocks]:
        out = block(hidden, attention_mask=None)
        hidden = out if isinstance(out, Tensor) else out[0]
    return hidden


def test_tokens_are_those_of_the_second_last_block(parts: Any) -> None:
    folder, network = parts
    tokens = encoder(folder).encode(images())
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (images().permute(0, 3, 1, 2) / 255 - mean) / std  # 16 x 16: nothing to resize
    assert tokens.shape == (2, 5, 8) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, blocks_of(network, pixels, 2), rtol=0, atol=1e-4)
    assert (tokens - blocks_of(network, pixels, 3)).abs().max() > 1e-2


def test_the_whole_picture_is_squeezed_into_the_square(parts: Any) -> None:
    """A wide one shows its edges, too."""
    wide = torch.zeros(1, 32, 96, 3, dtype=torch.uint8)
    edge = wide.clone()
    edge[:, :, :16] = 255
    tokens = encoder(parts[0]).encode(torch.cat([wide, edge]))
    assert (tokens[0] - tokens[1]).abs().max() > 1e-2


def test_the_original_file_gives_the_same_tokens(parts: Any, tmp_path: Path) -> None:
    """Queries, keys and values lie in one matrix there, and a text encoder beside them."""
    folder, network = parts
    state = {name.removeprefix("vision_model."): tensor for name, tensor in network.state_dict().items()}
    held = {
        "textual.head.0.weight": torch.zeros(2, 2),
        "log_scale": torch.zeros(()),
        "visual.head": torch.zeros(8, 4),
    }
    for theirs, ours in (
        ("embeddings.patch_embedding.weight", "patch_embedding.weight"),
        *((f"pre_layrnorm.{end}", f"pre_norm.{end}") for end in ("weight", "bias")),
        *((f"post_layernorm.{end}", f"post_norm.{end}") for end in ("weight", "bias")),
        *(
            (f"encoder.layers.{i}.{a}.{end}", f"transformer.{i}.{b}.{end}")
            for i in range(3)
            for a, b in (
                ("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("self_attn.out_proj", "attn.proj"),
                ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"),
            )
            for end in ("weight", "bias")
        ),
    ):  # fmt: skip
        held[f"visual.{ours}"] = state[theirs]
    held["visual.cls_embedding"] = state["embeddings.class_embedding"][None, None]
    held["visual.pos_embedding"] = state["embeddings.position_embedding.weight"][None]
    for i in range(3):
        for end in ("weight", "bias"):
            joined = [state[f"encoder.layers.{i}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            held[f"visual.transformer.{i}.attn.to_qkv.{end}"] = torch.cat(joined)
    torch.save(held, tmp_path / ORIGINAL)
    (tmp_path / "config.json").write_text((folder / "image_encoder" / "config.json").read_text())
    torch.testing.assert_close(
        encoder(tmp_path).encode(images()), encoder(folder).encode(images()), rtol=0, atol=0
    )
    torch.save(held | {"visual.lora": torch.zeros(1)}, tmp_path / ORIGINAL)
    with pytest.raises(ValueError, match=r"visual\.lora is no part of Wan's image encoder"):
        encoder(tmp_path).encode(images())


def test_an_image_is_encoded_once(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    network = ImageEncoder._network
    monkeypatch.setattr(ImageEncoder, "_network", lambda self: loads.append(1) or network(self))
    first = encoder(parts[0], tmp_path).encode(images(2))
    again = encoder(parts[0], tmp_path).encode(images(3))
    assert torch.equal(again[:2], first) and len(loads) == 2
    assert torch.equal(encoder(parts[0], tmp_path).encode(images(3)), again) and len(loads) == 2
    file = encoder(parts[0], tmp_path).file_of(images()[0])
    assert file is not None and file.exists()
    file.write_bytes(b"half")
    assert torch.equal(encoder(parts[0], tmp_path).encode(images(2)), first) and len(loads) == 3
    assert encoder(parts[0], tmp_path, dtype="bfloat16").file_of(images()[0]) != file
    assert torch.equal(encoder(parts[0]).encode(images(2)), first) and len(loads) == 4, "nothing is kept"


def test_encoders_that_are_none_are_refused(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        encoder(tmp_path / "nowhere")
    torch.save({"vision_model.pre_layrnorm.weight": torch.zeros(3)}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="does not hold the CLIP image encoder of the size ViT-H: "):
        encoder(tmp_path / "clip.pt").encode(images())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers .*pip install -e '\.\[wan\]'"):
        encoder(parts[0]).encode(images())
    assert clip.VIT_H["hidden_size"] == 1280

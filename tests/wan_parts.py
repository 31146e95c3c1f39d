"""Wan's parts in tiny, on random weights and on disk: what a user downloads, in its usual formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.small import text_backbone

WORDS = "a red cat runs over the green hill dog sits near blue river in rain".split()
VAE: dict[str, Any] = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 2], "num_res_blocks": 1}


def write_transformer(file: Path, **containers: float) -> dict[str, Tensor]:
    """Weights of tiny_text under Wan's names in a training checkpoint: container -> what is added to them."""
    state = {name: p.detach().clone() for name, p in text_backbone().transformer.named_parameters()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            name: {f"model.{key}": tensor + more for key, tensor in state.items()}
            for name, more in containers.items()
        },
        file,
    )
    return state


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """Wan's autoencoder with all of its kinds of layers."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(**VAE).eval()


def write_vae(folder: Path) -> AutoencoderKLWan:
    """As diffusers keeps it."""
    network = tiny_vae()
    network.save_pretrained(folder / "vae")
    return network


def write_text_encoder(folder: Path, width: int = 48) -> tuple[UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Encoder and tokenizer as diffusers keeps them; the words of `WORDS`, one token each."""
    pieces = ["<pad>", "</s>", "<unk>", *WORDS]
    words = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": width, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    network = UMT5EncoderModel(
        UMT5Config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **sizes)
    ).eval()
    network.save_pretrained(folder / "text_encoder")
    return network, tokenizer


def write_image_encoder(folder: Path, width: int = 8) -> CLIPVisionModel:
    """CLIP as diffusers keeps it: three blocks, four patches."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 12, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=8, hidden_act="gelu")
    network = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    network.save_pretrained(folder / "image_encoder")
    return network

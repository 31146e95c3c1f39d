"""Shipped checkpoints: what each format keeps, and one clear sentence for each way a folder can be wrong."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file

from fastar.backbones import (
    AutoencoderConfig,
    Backbone,
    BackboneConfig,
    WanConfig,
    build_backbone,
    load_backbone,
    save_backbone,
)
from fastar.backbones.base import build_from_config
from fastar.backbones.checkpoint import CONFIG, WEIGHTS, read_config

SIZES = {
    "name": "test",
    "transformer": WanConfig(dim=64, num_layers=1, num_heads=2, ffn_dim=96, freq_dim=64, num_actions=4),
    "autoencoder": AutoencoderConfig(
        encoder_widths=(16, 16, 16),
        encoder_blocks=(0, 0, 0),
        decoder_widths=(16, 16, 32),
        decoder_blocks=(0, 0, 1),
    ),
    "frame_size": (32, 48),
    "chunk_frames": 2,
    "context_frames": 8,
}


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(**SIZES)
    with torch.no_grad():
        for network in backbone.modules().values():
            for tensor in network.state_dict().values():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return backbone


def largest_error(loaded: Backbone, original: Backbone) -> dict[str, float]:
    """Largest difference of each tensor, relative to the tensor's largest value."""
    errors = {}
    for part, network in original.modules().items():
        state = loaded.modules()[part].state_dict()
        for name, tensor in network.state_dict().items():
            errors[f"{part}.{name}"] = ((state[name] - tensor).abs().max() / tensor.abs().max()).item()
    return errors


def test_float32_comes_back_bit_for_bit_with_config_and_checksum(backbone: Backbone, tmp_path: Path) -> None:
    sha256 = save_backbone(tmp_path / "new" / "folder", backbone, training={"steps": 12})
    loaded = load_backbone(tmp_path / "new" / "folder")
    assert max(largest_error(loaded, backbone).values()) == 0
    assert loaded.config == backbone.config
    assert loaded.sha256 == sha256 and len(sha256) == 64
    assert not loaded.transformer.training and not loaded.autoencoder.training
    assert read_config(tmp_path / "new" / "folder")["training"] == {"steps": 12}
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]
    assert all(p.requires_grad for p in loaded.transformer.parameters())


def test_whoever_may_read_the_config_may_read_the_weights(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path, backbone)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode


def test_bfloat16_rounds_every_tensor_and_halves_the_file(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path / "full", backbone)
    save_backbone(tmp_path / "half", backbone, storage="bfloat16")
    assert max(largest_error(load_backbone(tmp_path / "half"), backbone).values()) <= 2**-8
    half, full = ((tmp_path / folder / WEIGHTS).stat().st_size for folder in ("half", "full"))
    assert half < 0.6 * full


def test_int8_keeps_matrices_within_half_a_step_and_small_tensors_exactly(
    backbone: Backbone, tmp_path: Path
) -> None:
    save_backbone(tmp_path, backbone, storage="int8")
    loaded = load_backbone(tmp_path)
    weight = backbone.transformer.blocks[0].ffn[0].weight
    restored = loaded.transformer.blocks[0].ffn[0].weight
    half_step = weight.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((restored - weight).abs() <= half_step * 1.001).all()
    assert not torch.equal(restored, weight)
    assert load_file(tmp_path / WEIGHTS)["transformer.blocks.0.ffn.0.weight"].dtype == torch.int8
    errors = largest_error(loaded, backbone)
    for name in ("blocks.0.modulation", "blocks.0.ffn.0.bias", "blocks.0.self_attn.norm_q.weight"):
        assert errors[f"transformer.{name}"] == 0
    assert errors["autoencoder.latent_std"] == 0
    assert max(errors.values()) <= 0.5 / 127 * 1.001


def test_int8_leaves_the_velocity_close(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path, backbone, storage="int8")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 2, *backbone.config.latent_shape, generator=generator)
    timesteps, actions = torch.full((1, 2), 500.0), torch.tensor([[0, 3]])

    def velocity(backbone: Backbone) -> torch.Tensor:
        return backbone.transformer(
            latents, timesteps, attend=lambda stream, layer, q, k, v: v, actions=actions
        )

    with torch.no_grad():
        exact, restored = velocity(backbone), velocity(load_backbone(tmp_path))
    assert (restored - exact).norm() < 0.02 * exact.norm()


def test_dtype_is_that_asked_for(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path, backbone)
    loaded = load_backbone(tmp_path, dtype=torch.bfloat16)
    for network in loaded.modules().values():
        assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.bfloat16}


def test_a_backbone_without_autoencoder_travels_too(tmp_path: Path) -> None:
    plain = build_backbone(**(SIZES | {"autoencoder": None}))
    save_backbone(tmp_path, plain)
    loaded = load_backbone(tmp_path)
    assert loaded.autoencoder is None and loaded.config == plain.config


def test_saving_again_replaces_and_same_weights_give_the_same_checksum(
    backbone: Backbone, tmp_path: Path
) -> None:
    first = save_backbone(tmp_path, backbone)
    assert save_backbone(tmp_path, backbone) == first
    with torch.no_grad():
        backbone.transformer.head.head.bias.add_(1)
    assert save_backbone(tmp_path, backbone) != first
    assert max(largest_error(load_backbone(tmp_path), backbone).values()) == 0


def test_missing_files_are_named(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No checkpoint in .*config\.json is missing"):
        load_backbone(tmp_path / "nowhere")
    save_backbone(tmp_path, backbone)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_backbone(tmp_path)


def test_truncated_and_altered_weights_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path, backbone)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or incomplete"):
            load_backbone(tmp_path)


def test_broken_or_foreign_configs_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path, backbone)
    record = json.loads((tmp_path / CONFIG).read_text())

    def expect(message: str, text: str) -> None:
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_backbone(tmp_path)

    expect("not valid JSON", json.dumps(record)[:50])
    expect("not of checkpoint format 1", json.dumps(record | {"format_version": 2}))
    expect("lacks sha256", json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    expect(r"BackboneConfig does not fit: unknown \['colour'\]", _edited(record, colour=1))
    expect(r"WanConfig does not fit: unknown \['depth'\]", _edited(record, transformer={"depth": 3}))


def test_weights_of_another_backbone_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tmp_path, backbone)
    record = json.loads((tmp_path / CONFIG).read_text())
    record["backbone"]["transformer"]["num_layers"] = 2
    (tmp_path / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"15 tensors are missing .* 0 unexpected"):
        load_backbone(tmp_path)
    record["backbone"]["transformer"] |= {"num_layers": 1, "ffn_dim": 112}
    (tmp_path / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"3 of another shape \['transformer\.blocks\.0\.ffn"):
        load_backbone(tmp_path)


def test_a_file_that_is_no_safetensors_is_refused_even_with_a_right_checksum(
    backbone: Backbone, tmp_path: Path
) -> None:
    save_backbone(tmp_path, backbone)
    (tmp_path / WEIGHTS).write_bytes(b"not a tensor file")
    record = json.loads((tmp_path / CONFIG).read_text())
    record["sha256"] = hashlib.sha256(b"not a tensor file").hexdigest()
    (tmp_path / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_backbone(tmp_path)


def test_unknown_storage_names_the_choices(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, int8, got 'int4'"):
        save_backbone(tmp_path, backbone, storage="int4")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_frames": 7}, "context_frames 7 must be whole chunks of 2"),
        ({"frame_size": (32, 40)}, "must be multiples of 16 pixels"),
        (
            {"autoencoder": AutoencoderConfig(latent_channels=8)},
            "8 latent channels and the transformer makes 16",
        ),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**(SIZES | change))


def test_config_survives_json_and_gives_sizes() -> None:
    config = BackboneConfig(**SIZES)
    assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.latent_shape == (16, 4, 6)
    assert config.tokens_per_frame == 6


def test_the_doom_backbone_as_int8_is_at_most_18_megabytes(tmp_path: Path) -> None:
    conf = Path(__file__).parents[2] / "conf" / "backbone"
    with initialize_config_dir(str(conf), version_base=None):
        doom = instantiate(compose("doom"))
        tiny = instantiate(compose("tiny"))
        wan = instantiate(compose("wan_1_3b"), device="meta")
    save_backbone(tmp_path, doom, storage="int8")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 18_000_000
    assert doom.config.tokens_per_frame == tiny.config.tokens_per_frame == 48
    assert wan.config.tokens_per_frame == 1560
    assert build_from_config(wan.config, device="meta").autoencoder is None


def _edited(record: dict, **changes: object) -> str:
    backbone = dict(record["backbone"])
    for name, value in changes.items():
        backbone[name] = {**backbone[name], **value} if isinstance(value, dict) else value
    return json.dumps(record | {"backbone": backbone})

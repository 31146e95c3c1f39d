"""Two commands from a downloaded checkpoint to a comparison: each family's, on a file as it is published, in tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastar.attention.rope import RotaryEmbedding
from fastar.backbones.wan.keys import to_diffusers_names
from fastar.cache.base import CacheSpec
from fastar.compare.job import compare
from fastar.compare.methods import budgeted, method_of, resolved
from fastar.compare.prompt_videos import roll_prompts
from fastar.compare.session import open_session
from fastar.compare.single import roll
from fastar.compare.weights import random_backbone
from fastar.data.video import read_mp4
from fastar.results import load, load_runs
from tests.experiments.conftest import ROOT, values
from tests.wan_parts import write_image_encoder, write_text_encoder, write_vae

State = dict[str, Tensor]

# What is typed for each family besides checkpoint=..., autoencoder=wan, dtype=bfloat16 and the prompts: what both
# commands have, and what else experiments/rollout.py and experiments/compare.py (with workload=wan_prompts) have.
COMMANDS = {
    "self_forcing": ("backbone=wan_1_3b rollout=self_forcing", "data=prompts", ""),
    "causvid": ("backbone=wan_1_3b rollout=causvid", "data=prompts", ""),
    "longlive": ("backbone=wan_1_3b rollout=longlive lora=lora.pt", "data=prompts", ""),
    "rolling_forcing": ("backbone=wan_1_3b rollout=rolling_forcing", "data=prompts", ""),
    "skyreels_v2": (
        "backbone=skyreels_v2_df_1_3b rollout=diffusion_forcing rollout.guidance=6 rollout.solver=unipc "
        "autoencoder.fps=24",
        "data=prompts",
        "frames=25 history_frames=25",
    ),
    "wan_i2v": ("backbone=wan_i2v_14b rollout=self_forcing image=street.png", "data=prompts", ""),
    "matrix_game_2": (
        "backbone=matrix_game_2 rollout=matrix_game_2 data=image image=street.png actions=forward*24",
        "",
        "source=image prompts=null",
    ),
}
SMALL = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}
STREAMS = {"text_dim": 48, "text_len": 24, "image_dim": 8}


def downloaded(family: str, state: State) -> str:
    """Writes the weights as their authors have them, and averaged ones that differ; what checkpoint=... names."""
    file = Path("weights.pt")
    wrapped = {f"model.{name}": tensor for name, tensor in state.items()}
    off = {name: tensor + 1 for name, tensor in wrapped.items()}
    sharded = {f"model._fsdp_wrapped_module.{name}": tensor.clone() for name, tensor in state.items()}
    if family == "self_forcing":
        torch.save({"generator": off, "generator_ema": wrapped}, file)
    elif family == "causvid":
        torch.save({"generator": wrapped}, file)
    elif family == "longlive":
        name = "blocks.0.ffn.2"  # with the LoRA, which adds 1 there, it is what `state` has
        sharded[f"model._fsdp_wrapped_module.{name}.weight"] -= 1
        torch.save({"generator": sharded}, file)
        factors = {"lora_A": torch.ones(2, 48), "lora_B": torch.full((32, 2), 0.5)}
        held = {f"base_model.model.{name}.{half}.default.weight": factor for half, factor in factors.items()}
        torch.save({"generator_lora": held}, "lora.pt")
    elif family == "rolling_forcing":
        torch.save({"generator_ema": sharded, "generator": off}, file)
    elif family == "skyreels_v2":
        Path("weights/transformer").mkdir(parents=True)
        save_file(state, "weights/transformer/diffusion_pytorch_model.safetensors")
        return "weights"
    else:
        save_file(state, file.with_suffix(".safetensors"))
        return str(file.with_suffix(".safetensors"))
    return str(file)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoder and encoders, which all families share."""
    folder = tmp_path_factory.mktemp("parts")
    write_vae(folder)
    write_text_encoder(folder)
    write_image_encoder(folder)
    return folder


@pytest.mark.parametrize("family", COMMANDS)
def test_from_a_downloaded_checkpoint_to_a_comparison(
    family: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights arrive, whatever they were wrapped in; there is a video; methods are compared in B and C."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cat runs over the hill\n")
    Image.new("RGB", (96, 64), (250, 20, 30)).save("street.png")
    both, rolls, compares = COMMANDS[family]
    told = "" if family == "matrix_game_2" else "prompts=prompts.txt"
    typed = [both, told, "autoencoder=wan", *small_parts(family, parts)]
    rolled = composed("rollout", *typed, rolls, "method=dense").backbone
    typed += [*shrunk(rolled), f"frames={2 * rolled.chunk_frames}"]
    backbone = random_backbone(
        composed("rollout", *typed, rolls, "method=dense").backbone, torch.device("cpu")
    )
    wanted = {name: tensor.clone() for name, tensor in backbone.transformer.state_dict().items()}
    named = to_diffusers_names(wanted, backbone.config.transformer) if family == "skyreels_v2" else wanted
    typed.append(f"checkpoint={downloaded(family, named)}")

    config = composed("rollout", *typed, rolls, "method=dense")
    for name, tensor in open_session(config).backbone.transformer.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)
    (roll if family == "matrix_game_2" else roll_prompts)(config)
    video = next(tmp_path.rglob("*.mp4"))
    assert read_mp4(video).shape == (1 + 4 * (2 * rolled.chunk_frames - 1), 32, 48, 3)

    lengths = " ".join(word for word in compares.split() if not word.startswith("frames="))
    settings = [lengths, "dtype=float32 seeds=1", "method=[dense,empty]"]
    compare(composed("compare", "workload=wan_prompts", *typed, *settings), report=family == "self_forcing")
    rows, runs = load(tmp_path / "outputs/compare"), load_runs(tmp_path / "outputs/compare")
    assert set(runs["status"]) == {"done"} and set(runs["protocol"]) == {"B", "C"} and len(runs) == 4
    for protocol in "BC":
        first, last = values(rows, "psnr", method="empty", protocol=protocol)
        assert first == 100 > last, "a first chunk has no past"


def composed(command: str, *lines: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base=None):
        return compose(command, overrides=[word for line in lines for word in line.split()])


def small_parts(family: str, parts: Path) -> list[str]:
    """Where autoencoder and encoders are, all in float32."""
    found = [f"autoencoder.checkpoint={parts}", f"data.image_encoder.checkpoint={parts}", "device=cpu"]
    if family != "matrix_game_2":
        found += [f"data.encoder.checkpoint={parts}", "data.encoder.dtype=float32"]
    if family == "skyreels_v2":
        found.append("rollout.timesteps.num_steps=4")
    return found


def shrunk(backbone: DictConfig) -> list[str]:
    """Overrides that make a backbone tiny."""
    sizes = SMALL | {key: size for key, size in STREAMS.items() if backbone.transformer.get(key) is not None}
    found = [f"backbone.transformer.{key}={size}" for key, size in sizes.items()]
    if backbone.transformer.get("action_module") is not None:
        found += [f"++backbone.transformer.action_module.{key}=1" for key in ("layers", "num_heads")]
    return [*found, "backbone.frame_size=[32,48]"]


@pytest.mark.parametrize("name", ["wan_1_3b", "skyreels_v2_df_1_3b", "matrix_game_2"])
def test_all_methods_fit_at_the_budget_that_the_workload_names(name: str) -> None:
    """Chunks and frames of the published sizes, in one layer; what is too small is said before anything is made."""
    methods = sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml"))
    asked = ["workload=wan_prompts", f"backbone={name}", f"method=[{','.join(methods)}]", "budget_share=0.4"]
    config = composed("compare", *asked, "history_frames=${backbone.context_frames}" if "sky" in name else "")
    geometry = config.backbone
    follow = budgeted(config.methods)
    assert {"tempcache", "window", "sink_recent", "random", "key_norm", "int4_window"} <= follow
    spec = CacheSpec(
        num_layers=1, batch=1, num_heads=geometry.transformer.num_heads, head_dim=128,
        tokens_per_frame=geometry.frame_size[0] * geometry.frame_size[1] // 256, rope=RotaryEmbedding(128),
        compute_dtype=torch.bfloat16, device=torch.device("cpu"), chunk_frames=geometry.chunk_frames, key_width=128,
    )  # fmt: skip
    for method, node in resolved(config).items():
        if method in follow:
            plain = {"commit_by": "plain"} if "commit_by" in node["cache"] else {}
            cache = method_of(method, {**node, "cache": node["cache"] | plain}).cache()
            cache.bind(spec)
            assert (cache.capacity_bytes() or 0) <= 0.4 * config.history_frames * frame_bytes(spec)


def frame_bytes(spec: CacheSpec) -> int:
    return 2 * 2 * spec.num_heads * spec.head_dim * spec.tokens_per_frame

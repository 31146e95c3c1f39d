"""Published weights into a backbone: what is loaded, by which checksum it is known, and what is refused."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file
from torch import Tensor

from fastar.backbones import Backbone, load_backbone, pretrained, save_backbone
from fastar.backbones.pretrained import checksum, load_checkpoint, read_tensors, remembered_sha256
from fastar.backbones.storage import sha256_of
from fastar.backbones.wan.keys import to_diffusers_names
from tests.small import configs, text_backbone
from tests.wan_parts import write_transformer

Load = Callable[..., Backbone]


@pytest.fixture(scope="module")
def load() -> Load:
    """Into the backbone tiny_text."""
    return partial(
        load_checkpoint, shapes=partial(instantiate, configs("backbone")["tiny_text"], device="meta")
    )


def parameters(backbone: Backbone) -> dict[str, Tensor]:
    return dict(backbone.transformer.named_parameters())


def equal(backbone: Backbone, state: dict[str, Tensor], more: float = 0) -> bool:
    return all(torch.equal(tensor, state[name] + more) for name, tensor in parameters(backbone).items())


def test_a_training_checkpoint_gives_its_averaged_weights_unless_told_otherwise(
    load: Load, tmp_path: Path
) -> None:
    file = tmp_path / "dmd.pt"
    state = write_transformer(file, generator=0.5, generator_ema=0)
    averaged, last = load(file), load(file, use_ema=False)
    assert equal(averaged, state) and equal(last, state, 0.5)
    assert averaged.sha256 == sha256_of(file) and last.sha256 not in (None, averaged.sha256)
    assert averaged.autoencoder is None and not averaged.transformer.training
    assert load(file, dtype=torch.bfloat16).transformer.head.head.weight.dtype == torch.bfloat16


def test_shards_of_a_diffusers_folder_are_one_checkpoint(load: Load, tmp_path: Path) -> None:
    backbone = text_backbone()
    theirs = to_diffusers_names(parameters(backbone), backbone.config.transformer)
    names = sorted(theirs)
    folder = tmp_path / "transformer"
    folder.mkdir()
    shards = {"m-1.safetensors": names[: len(names) // 2], "m-2.safetensors": names[len(names) // 2 :]}
    for shard, part in shards.items():
        save_file({name: theirs[name].detach().contiguous() for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(tmp_path)
    assert equal(loaded, parameters(backbone))
    sums = [[name, sha256_of(folder / name)] for name in shards]
    assert loaded.sha256 == hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    (folder / "m-2.safetensors").write_bytes((folder / "m-2.safetensors").read_bytes()[:-50])
    with pytest.raises(
        ValueError, match=r"m-2\.safetensors \(\d+ bytes\) is truncated or no file of weights"
    ):
        load(tmp_path)


def test_our_own_folder_is_loaded_as_ever(load: Load, tmp_path: Path) -> None:
    backbone = text_backbone()
    sha256 = save_backbone(tmp_path, backbone)
    loaded = load_checkpoint(tmp_path, partial(pytest.fail, "asked for shapes"), dtype=torch.bfloat16)
    assert loaded.sha256 == sha256 == load_backbone(tmp_path).sha256 and loaded.config == backbone.config
    assert loaded.transformer.head.head.weight.dtype == torch.bfloat16


def test_a_lora_is_merged_and_known_by_its_checksum(load: Load, tmp_path: Path) -> None:
    """Into float32 weights, before they are rounded; as LongLive's file has it, and into our own folders, too."""
    state = write_transformer(tmp_path / "base.pt", generator=0)
    name = "blocks.1.ffn.2"
    a, b = torch.randn(3, 192), torch.randn(64, 3)
    factors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    (tmp_path / "lora").mkdir()
    torch.save({"generator_lora": factors}, tmp_path / "lora" / "lora.pt")
    plain, merged = load(tmp_path / "base.pt"), load(tmp_path / "base.pt", lora=tmp_path / "lora")
    state[f"{name}.weight"] += b @ a
    assert equal(merged, state) and not equal(plain, state) and not merged.transformer.training
    assert plain.lora_sha256 is None and merged.lora_sha256 == sha256_of(tmp_path / "lora" / "lora.pt")
    half = load(tmp_path / "base.pt", lora=tmp_path / "lora" / "lora.pt", dtype=torch.bfloat16)
    assert equal(half, {key: tensor.bfloat16() for key, tensor in state.items()})
    twice = load(tmp_path / "base.pt", lora=tmp_path / "lora", lora_alpha=6)
    assert len({plain.sha256, merged.sha256, twice.sha256}) == 3
    state[f"{name}.weight"] += b @ a
    torch.testing.assert_close(parameters(twice)[f"{name}.weight"], state[f"{name}.weight"])
    save_backbone(tmp_path / "ours", plain)
    ours = load(tmp_path / "ours", lora=tmp_path / "lora")
    assert equal(ours, parameters(merged)) and ours.lora_sha256 == merged.lora_sha256


def test_a_lora_that_is_missing_or_does_not_fit_is_one_sentence(load: Load, tmp_path: Path) -> None:
    write_transformer(tmp_path / "base.pt", generator=0)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*lora\.pt: give a file"):
        load(tmp_path / "base.pt", lora=tmp_path / "lora.pt")
    torch.save({"blocks.9.ffn.2.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora\.pt: The LoRA file \(1 tensors\) does not fit") as error:
        load(tmp_path / "base.pt", lora=tmp_path / "lora.pt")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says what is mapped on Linux alone")
def test_a_parameter_is_read_when_it_is_copied_and_not_before(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is mapped: its tensors share the mapping, and only the network has memory of its own."""
    file = tmp_path / "dmd.pt"
    write_transformer(file, generator_ema=0)
    held: list[dict[str, Tensor]] = []

    def look(read: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        held.append(read["generator_ema"])
        return held[0]

    monkeypatch.setattr(pretrained, "unwrap_container", look)
    loaded = load(file)
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if line.endswith(f" {file}")]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in places]

    def inside(tensors: Iterable[Tensor]) -> set[bool]:
        return {any(tensor.data_ptr() in place for place in mapped) for tensor in tensors}

    assert inside(held[0].values()) == {True} and inside(loaded.transformer.parameters()) == {False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("model.head.modulation"),
            r"1 \(head\.modulation\) missing, none unexpected",
        ),
        (lambda state: state.update({"model.lora": torch.zeros(1)}), r"1 \(lora\) unexpected"),
        (
            lambda state: state.update({"model.head.head.weight": torch.zeros(2, 2)}),
            r"head\.head\.weight is \(2, 2\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_with_their_file(
    load: Load, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    file = tmp_path / "dmd.pt"
    write_transformer(file, generator=0)
    held = torch.load(file)
    change(held["generator"])
    torch.save(held, file)
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


# -- files that are none -----------------------------------------------------------------------------------------------


def test_pickles_of_before_zip_files_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors([tmp_path / "old.pt"])["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", r"\(0 bytes\) is truncated or no file of weights: download it again"),
        ("a.pt", b"<html>404</html>", r"\(16 bytes\) is truncated or no file of weights"),
        ("a.safetensors", b"", r"\(0 bytes\) is truncated"),
        ("a.safetensors", b"version https://git-lfs", r"is truncated or no file of weights"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_tensors([tmp_path / name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "share"), [(False, 0.02), (False, 0.5), (False, 0.99), (True, 0.1), (True, 0.99)]
)
def test_truncated_pickles_are_refused(tmp_path: Path, share: float, old: bool) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.arange(1000)}, file, _use_new_zipfile_serialization=not old)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is truncated or no file of weights"):
        read_tensors([file])


def test_what_could_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "path": Path("here")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds more than tensors, and loading that could run foreign code"):
        read_tensors([tmp_path / "a.pt"])
    torch.save([torch.zeros(1)], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds a list instead of tensors by name"):
        read_tensors([tmp_path / "b.pt"])


# -- checksums ---------------------------------------------------------------------------------------------------------


def test_a_checksum_is_taken_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = tmp_path / "a.pt", tmp_path / "cache"
    file.write_bytes(b"some weights")
    taken: list[Path] = []
    monkeypatch.setattr(pretrained, "sha256_of", lambda path: taken.append(path) or sha256_of(path))
    first = remembered_sha256(file, cache)
    assert (
        first == remembered_sha256(file, cache) == checksum([file], cache) == sha256_of(file)
        and len(taken) == 1
    )
    [note] = (cache / "sha256").iterdir()
    note.write_text("{")
    assert remembered_sha256(file, cache) == first and len(taken) == 2, "a note that cannot be read"
    os.utime(file, ns=(1, 1))
    assert remembered_sha256(file, cache) == first and len(taken) == 3, "another time of change"
    file.write_bytes(b"other weights")
    os.utime(file, ns=(1, 1))
    assert remembered_sha256(file, cache) == sha256_of(file) != first and len(taken) == 4, "another size"
    assert remembered_sha256(file, None) == sha256_of(file) and len(taken) == 5
    assert not list(cache.rglob("*.part"))

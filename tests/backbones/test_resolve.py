"""Where checkpoints are found, and what is said where they are not. No test reaches for a network."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from fastar.backbones import AutoencoderConfig, WanConfig, build_backbone, save_backbone
from fastar.backbones.resolve import find_weights

Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """`files("a/b.pt", ...)`: these files below tmp_path, each holding its own name."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps({"name": name}))
        return tmp_path

    return make


def found(checkpoint: str | Path, **options: Any) -> list[str]:
    """Names of the files, with their folder."""
    weights = find_weights(checkpoint, part="transformer", **options)
    return [f"{file.parent.name}/{file.name}" for file in weights.files]


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.safetensors"])
def test_a_file_is_itself(files: Files, name: str) -> None:
    folder = files(f"some/{name}")
    assert found(folder / "some" / name) == [f"some/{name}"]
    assert find_weights(folder / "some" / name, part="vae").config is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.pt", "weights.safetensors"], ["weights.safetensors"]),
        (
            ["transformer/diffusion.safetensors", "other.safetensors", "vae/x.safetensors"],
            ["diffusion.safetensors"],
        ),
        (["Wan.pth", "diffusion.safetensors", "t5.pth"], ["diffusion.safetensors"]),
        (["only.pth", "readme.md", "config.json"], ["only.pth"]),
    ],
)
def test_a_folder_is_what_it_holds(files: Files, names: list[str], expected: list[str]) -> None:
    assert [name.split("/")[1] for name in found(files(*names))] == expected


def test_the_usual_name_decides_where_there_are_several(files: Files) -> None:
    folder = files("Wan2.1_VAE.pth", "models_t5.pth", "diffusion.safetensors", "config.json")
    vae = find_weights(folder, part="vae", usual=("Wan2.1_VAE.pth",))
    assert [file.name for file in vae.files] == ["Wan2.1_VAE.pth"] and vae.config == folder / "config.json"
    (folder / "second.safetensors").touch()
    with pytest.raises(ValueError, match=r"several files of weights: name diffusion\.safetensors or second"):
        find_weights(folder, part="transformer")


def test_shards_come_in_the_order_of_their_names_and_all_of_them(files: Files) -> None:
    folder = files("m-1.safetensors", "m-2.safetensors", "stray.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors"}}))
    for checkpoint in (folder, index):
        assert [name.split("/")[1] for name in found(checkpoint)] == ["m-1.safetensors", "m-2.safetensors"]
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 shards .* are missing, m-2\.safetensors first"):
        find_weights(folder, part="transformer")
    index.write_text("[]")
    with pytest.raises(ValueError, match="does not list shards"):
        find_weights(folder, part="transformer")


def test_our_own_folders_are_known(tmp_path: Path) -> None:
    blocks = {"encoder_blocks": (0, 0, 0), "decoder_blocks": (0, 0, 0)}
    backbone = build_backbone(
        name="own",
        transformer=WanConfig(dim=16, num_layers=1, num_heads=1, ffn_dim=16, freq_dim=16),
        autoencoder=AutoencoderConfig(encoder_widths=(16, 16, 16), decoder_widths=(16, 16, 16), **blocks),
        frame_size=(16, 16),
        chunk_frames=1,
        context_frames=1,
    )
    save_backbone(tmp_path, backbone)
    weights = find_weights(tmp_path, part="transformer")
    assert weights.ours and weights.folder == tmp_path
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert not find_weights(tmp_path, part="transformer").ours


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("nowhere.pt", FileNotFoundError, "there is no checkpoint nowhere.pt: give a file"),
        ("some/nowhere.safetensors", FileNotFoundError, "there is no checkpoint some/nowhere.safetensors"),
        ("/nowhere/at/all", FileNotFoundError, r"hub id, owner/name\[@revision\]\[:file\]"),
        ("checkpoints/wan_1_3b", FileNotFoundError, "there is no checkpoint checkpoints/wan_1_3b"),
        ("empty/other", FileNotFoundError, "there is no checkpoint empty/other"),
        ("empty", ValueError, "empty holds no weights .* nor does a folder transformer in it"),
        ("notes.txt", ValueError, r"notes.txt is no file of weights: give one of \.safetensors"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    files: Files, monkeypatch: pytest.MonkeyPatch, checkpoint: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(files("notes.txt", "empty/readme.md"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(error, match=message) as caught:
        find_weights(checkpoint, part="transformer")
    assert "\n" not in str(caught.value)


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub: `folder` is what the repository holds, `snapshot` what has been downloaded of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.snapshot = folder, folder.with_name("snapshot")
        self.snapshot.mkdir(parents=True)
        self.asked: list[Any] = []

    def hf_hub_download(self, repo: str, file: str, *, revision: str | None) -> str:
        self.asked.append((repo, file, revision))
        if not (self.folder / file).exists():
            raise RemoteEntryNotFoundError(f"404: {file} is not there", response=_Response())  # type: ignore[arg-type]
        return str(self.folder / file)

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        self.asked.append((repo, allow_patterns, revision))
        names = [
            file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()
        ]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, self.snapshot / name)
        return str(self.snapshot)


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    made.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_file_of_a_repository_is_downloaded(hub: Hub, files: Files) -> None:
    files("hub/checkpoints/dmd.pt")
    assert found("owner/name:checkpoints/dmd.pt") == ["checkpoints/dmd.pt"]
    assert found("owner/name@v1.0:checkpoints/dmd.pt") == ["checkpoints/dmd.pt"]
    assert hub.asked == [
        ("owner/name", "checkpoints/dmd.pt", None),
        ("owner/name", "checkpoints/dmd.pt", "v1.0"),
    ]
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint owner/name:other\.pt, neither here nor on the hub"
    ):
        find_weights("owner/name:other.pt", part="transformer")


def test_of_a_repository_only_the_part_is_fetched(hub: Hub, files: Files) -> None:
    files("hub/transformer/diffusion.safetensors", "hub/transformer/config.json")
    weights = find_weights("owner/name@main", part="transformer")
    assert weights.files[0].name == "diffusion.safetensors" and weights.config is not None
    [(repo, patterns, revision)] = hub.asked
    assert (repo, revision) == ("owner/name", "main") and patterns == ["transformer/*", "config.json"]


def test_a_repository_without_parts_is_looked_through_safetensors_first(hub: Hub, files: Files) -> None:
    files("hub/model.pt", "hub/Wan2.1_VAE.pth", "hub/sub/other.safetensors", "hub/tokenizer/tokenizer.json")
    options: dict[str, Any] = {"part": "vae", "usual": ("Wan2.1_VAE.pth",), "beside": ("tokenizer/*",)}
    assert [file.name for file in find_weights("owner/name", **options).files] == ["Wan2.1_VAE.pth"]
    downloaded = {path.name for path in hub.snapshot.rglob("*.*")}
    assert downloaded == {"Wan2.1_VAE.pth", "tokenizer.json"} and len(hub.asked) == 1
    with pytest.raises(ValueError, match=r"several files of weights: name Wan2\.1_VAE\.pth or model\.pt"):
        find_weights("owner/name", part="transformer")
    files("hub/model.safetensors")
    assert found("owner/name") == ["snapshot/model.safetensors"], (
        "not what another network left in the snapshot"
    )
    assert not list(hub.snapshot.rglob("other.safetensors"))
    shutil.rmtree(hub.snapshot)
    hub.snapshot.mkdir()
    for name in ("model.pt", "Wan2.1_VAE.pth", "model.safetensors"):
        (hub.folder / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"owner/name has no weights at its top nor in transformer/: name the"
    ):
        find_weights("owner/name", part="transformer")


def test_what_was_put_into_the_store_needs_no_hub(hub: Hub, files: Files) -> None:
    files("checkpoints/owner/name/sub/dmd.pt", "checkpoints/owner/name/transformer/m.safetensors")
    assert found("owner/name:sub/dmd.pt") == ["sub/dmd.pt"]
    assert found("owner/name") == ["transformer/m.safetensors"]
    assert hub.asked == []


def test_without_a_network_it_is_said_what_to_download_and_where_to_put_it(
    hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for checkpoint, command in (
        ("owner/name", "`hf download owner/name --local-dir name`"),
        ("owner/name@v1:a/b.pt", "`hf download owner/name a/b.pt --revision v1 --local-dir name`"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(command)) as caught:
            find_weights(checkpoint, part="transformer")
        assert str(caught.value).endswith("and put that folder here as checkpoints/owner/name")
        assert "\n" not in str(caught.value)
    # and that is enough
    shutil.copytree(files("name/a/b.pt") / "name", "checkpoints/owner/name")
    assert found("owner/name@v1:a/b.pt") == ["a/b.pt"]


def test_the_real_client_says_so_when_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", True
    )  # HF_HUB_OFFLINE=1, which is read on import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for checkpoint in ("owner/name:model.pt", "owner/name"):
        with pytest.raises(FileNotFoundError, match="owner/name is neither here nor in the hub's cache"):
            find_weights(checkpoint, part="transformer")

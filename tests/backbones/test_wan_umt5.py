"""Wan's text encoder: what it makes of prompts, and when it is loaded at all."""

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from fastar.backbones.wan import umt5
from fastar.backbones.wan.umt5 import NAMES, PromptEncoder, clean
from tests.wan_parts import write_text_encoder

CAT, DOG = "a red cat runs", "a dog sits near the blue river in rain"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UMT5EncoderModel, Any]:
    """A diffusers folder, and the encoder and tokenizer in it."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, *write_text_encoder(folder)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the encoder is loaded."""
    counted: list[int] = []
    network = PromptEncoder._network
    monkeypatch.setattr(PromptEncoder, "_network", lambda self, lib: counted.append(1) or network(self, lib))
    return counted


def encoder(folder: Path, cache: Path | None = None, **options: Any) -> PromptEncoder:
    return PromptEncoder(folder, cache=cache, **{"dtype": "float32", "length": 12, "device": "cpu"} | options)


def test_embeddings_are_those_of_transformers_up_to_the_end_of_the_prompt(parts: Any) -> None:
    folder, network, tokenizer = parts
    found = encoder(folder).encode([CAT, DOG])
    assert found.lengths.tolist() == [5, 10] and found.embeddings.shape == (2, 10, 48)
    for prompt, rows, length in zip((CAT, DOG), found.embeddings, found.lengths, strict=True):
        with torch.no_grad():
            alone = network(
                **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            ).last_hidden_state[0]
        torch.testing.assert_close(rows[:length], alone, rtol=0, atol=1e-5)
        assert not rows[length:].any(), "nothing behind the end"
    assert found.text("cpu", torch.float32).shape == (2, 10, 48)


def test_the_mask_is_inside_the_encoder(parts: Any) -> None:
    """Padding to another length changes nothing; without the mask it would."""
    short, long = (encoder(parts[0], length=length).encode([CAT]).embeddings for length in (6, 60))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)
    _, network, tokenizer = parts
    padded = tokenizer(CAT, padding="max_length", max_length=60, return_tensors="pt").input_ids
    with torch.no_grad():
        unmasked = network(input_ids=padded).last_hidden_state[:, :5]
    assert (unmasked - long).abs().max() > 1e-3


def test_too_many_tokens_are_cut_and_it_is_said(parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = encoder(parts[0], length=4).encode([CAT, "a cat"])
    assert found.lengths.tolist() == [4, 3]
    assert [record.message for record in caplog.records] == [
        "a prompt of 5 tokens is cut to 4: a red cat runs..."
    ]


def test_the_dtype_is_that_asked_for(parts: Any) -> None:
    assert encoder(parts[0], dtype="bfloat16").encode([CAT]).embeddings.dtype == torch.bfloat16


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_once_whoever_asks(parts: Any, tmp_path: Path, loads: list[int]) -> None:
    first = encoder(parts[0], tmp_path).encode([CAT, DOG])
    again = encoder(parts[0], tmp_path).encode([DOG, f"  {CAT.replace(' ', '  ')} "])
    assert len(loads) == 1
    assert torch.equal(again.embeddings[0], first.embeddings[1]) and torch.equal(
        again.lengths.flip(0), first.lengths
    )
    encoder(parts[0], tmp_path).encode([CAT, "a hill", DOG])
    assert len(loads) == 2 and len(list((tmp_path / "prompts").iterdir())) == 3
    nothing = encoder(parts[0])
    nothing.prepare([CAT])
    nothing.encode([CAT])
    assert len(loads) == 3, "without a cache it is remembered as long as the encoder"


def test_another_encoder_length_or_dtype_is_another_entry(
    parts: Any, tmp_path: Path, loads: list[int]
) -> None:
    other = tmp_path / "other"
    network, _ = write_text_encoder(other)
    with torch.no_grad():
        network.shared.weight.add_(1)
    network.save_pretrained(other / "text_encoder")
    made = [
        encoder(parts[0], tmp_path),
        encoder(other, tmp_path),
        encoder(parts[0], tmp_path, length=11),
        encoder(parts[0], tmp_path, dtype="bfloat16"),
    ]
    for each in made:
        each.encode([CAT])
    assert len(loads) == 4 and len(list((tmp_path / "prompts").iterdir())) == 4
    assert len({each.sha256 for each in made}) == 3, "the length is no part of the encoder"


@pytest.mark.parametrize("damage", ["cut", "empty", "of another prompt", "not finite"])
def test_a_damaged_entry_is_made_again_with_a_warning(
    parts: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, loads: list[int]
) -> None:
    whole = encoder(parts[0], tmp_path).encode([CAT, DOG])
    file, other = (encoder(parts[0], tmp_path).file_of(prompt) for prompt in (CAT, DOG))
    assert file is not None and other is not None
    if damage == "of another prompt":
        file.write_bytes(other.read_bytes())
    elif damage == "not finite":
        save_file({"embeddings": torch.full((5, 48), torch.nan)}, file, metadata={"prompt": CAT})
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        again = encoder(parts[0], tmp_path).encode([CAT, DOG])
    assert torch.equal(again.embeddings, whole.embeddings) and len(loads) == 2
    assert [record.message for record in caplog.records] == [
        f"{file} is damaged: its prompt is encoded again"
    ]
    encoder(parts[0], tmp_path).encode([CAT])
    assert len(loads) == 2 and not list(tmp_path.rglob("*.part"))


def test_the_encoder_is_let_go(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    made: list[weakref.ref] = []
    network = PromptEncoder._network

    def watched(self: PromptEncoder, library: Any) -> Any:
        built = network(self, library)
        made.append(weakref.ref(built))
        return built

    monkeypatch.setattr(PromptEncoder, "_network", watched)
    encoder(parts[0]).encode([CAT])
    gc.collect()
    assert made[0]() is None


# -- cleaning ----------------------------------------------------------------------------------------------------------


def test_white_space_is_collapsed_without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean("  a red\tcat\n\nruns <fast>; 50% of it ") == "a red cat runs <fast>; 50% of it"
    for prompt in ("caf\u00e9", "tom &amp; jerry", "a \x1b[31mred cat"):
        with pytest.raises(ValueError, match=re.escape("Wan cleans with ftfy: pip install -e '.[wan]'")):
            clean(prompt)


def test_entities_are_resolved_twice_after_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    stand_in = SimpleNamespace(fix_text=lambda text: seen.append(text) or text.replace("\u2019", "'"))
    monkeypatch.setitem(sys.modules, "ftfy", stand_in)
    assert clean(" a cat\u2019s  hat &amp;amp; &lt;coat&gt;\n") == "a cat's hat & <coat>"
    assert seen == [" a cat\u2019s  hat &amp;amp; &lt;coat&gt;\n"]


def test_plain_prompts_are_what_ftfy_would_leave() -> None:
    """The claim on which ftfy is left out for them."""
    ftfy = pytest.importorskip("ftfy", reason="ftfy is not installed")
    printable = "".join(chr(code) for code in range(32, 127) if chr(code) != "&")
    for prompt in (printable, "a 'quoted' \"word\" -- and so on...", "<b>bold</b> \\u00e9 \\x41 %20"):
        assert ftfy.fix_text(prompt) == prompt


# -- where it comes from -----------------------------------------------------------------------------------------------


def test_the_original_file_gives_the_same(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, network, tokenizer = parts
    sizes = network.config.to_dict()
    monkeypatch.setattr(umt5, "XXL", {name: sizes[name] for name in umt5.XXL if name in sizes})
    state = {
        name: tensor for name, tensor in network.state_dict().items() if name != "encoder.embed_tokens.weight"
    }
    original = {theirs_to_original(name): tensor for name, tensor in state.items()}
    assert len(original) == len(state) == 22 and "blocks.1.ffn.gate.0.weight" in original
    torch.save(original, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer beside .*download that of google/umt5-xxl and name its"
    ):
        encoder(tmp_path)
    tokenizer.save_pretrained(tmp_path / "google" / "umt5-xxl")
    (tmp_path / "Wan2.1_VAE.pth").touch()
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    expected, found = encoder(folder).encode([CAT]), encoder(tmp_path).encode([CAT])
    assert torch.equal(found.embeddings, expected.embeddings)
    torch.save(
        original | {"blocks.0.cross_attn.q.weight": torch.zeros(1)},
        tmp_path / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    with pytest.raises(ValueError, match=r"holds blocks\.0\.cross_attn\.q\.weight, which is no part of"):
        encoder(tmp_path).encode([CAT])


def theirs_to_original(name: str) -> str:
    """Inverse of the table, by trying its patterns."""
    for original, theirs in NAMES:
        pattern = re.escape(theirs).replace(re.escape(r"\1"), r"(\d+)").replace(re.escape(r"\2"), "([qkvo])")
        if match := re.fullmatch(pattern, name):
            for group in match.groups():
                original = re.sub(r"\(\\d\+\)|\(\[qkvo\]\)", group, original, count=1)
            return original.replace("\\", "")
    raise AssertionError(name)


def test_an_encoder_that_does_not_fit_is_one_sentence(parts: Any, tmp_path: Path) -> None:
    write_text_encoder(tmp_path)
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "text_encoder" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"does not hold the UMT5 encoder of .*: 23 tensors are missing or of another"
    ):
        encoder(tmp_path).encode([CAT])
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer in .*nowhere: download"):
        encoder(tmp_path, tokenizer=tmp_path / "nowhere")

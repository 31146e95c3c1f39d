"""The model card's measures, on the checkpoint that ships with the code: every one gives a number, none twice."""

import json
import math

import pytest
from hydra import compose, initialize_config_dir

from fastar.compare import evaluation as evaluate

pytest.importorskip("vizdoom", reason="the simulator needs fastar[doom]")


def settings(repository, output, *measures: str):
    overrides = [
        "backbone=tiny", f"checkpoint={repository}/checkpoints/tiny", f"output={output}", "device=cpu",
        "clips=2", "turns=4", "returns=2", "batch=2", "num_workers=0",
        "data.heldout.frames=32", "data.returns.history=48", f"measures=[{','.join(measures)}]",
    ]  # fmt: skip
    with initialize_config_dir(str(repository / "conf"), version_base=None):
        return compose("evaluate", overrides=overrides)


def test_measures_on_a_real_checkpoint(repository, tmp_path) -> None:
    measures = ("autoencoder", "next_frame", "actions", "memory")
    for _ in range(2):  # a second run replaces the first
        evaluate.run(settings(repository, tmp_path, *measures))
    rows = [json.loads(line) for line in (tmp_path / "backbone.jsonl").read_text().splitlines()]
    found = {row.pop("measure"): row for row in rows}
    (made,) = {row.pop("made") for row in found.values()}
    assert len(rows) == len(found) == 4
    assert all(math.isfinite(value) for row in found.values() for value in row.values())
    assert found["autoencoder_psnr"]["mean"] > 20  # it is trained
    assert found["next_frame"]["bound_psnr"] > found["next_frame"]["model_psnr"]
    assert 0 <= found["action_following"]["share"] <= 1 and found["action_following"]["tries"] == 4
    assert found["memory"]["bound_psnr"] > found["memory"]["dense_psnr"]
    assert (tmp_path / "returns.png").stat().st_size > 1000
    card = (tmp_path / "backbone.md").read_text()
    assert card.endswith(f"\nMeasured with {made}.\n") and "timesteps 1000, 900, 750, 500, " in made
    assert card.count("\n") == 2 + 5 + 2 and f"{found['memory']['gain']:.2f} [" in card


def test_an_unknown_measure_names_the_choices(repository, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown measure 'speed': choose from autoencoder, next_frame"):
        evaluate.run(settings(repository, tmp_path, "speed"))

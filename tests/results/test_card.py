"""The model card's table."""

from fastar.results.card import evaluation_page, evaluation_table


def test_measures_stand_beside_their_targets() -> None:
    gain = {"gain": 2.5, "gain_low": 2.0, "gain_high": 3.0}
    rows = [
        {"measure": "memory", "dense_psnr": 20.0, "window_16_psnr": 17.5, "empty_psnr": 15.0, "bound_psnr": 33.0,
         "returns": 128, **gain},
        {"measure": "next_frame", "model_psnr": 28.0, "copy_psnr": 18.0, "bound_psnr": 33.0, "clips": 90, **gain},
        {"measure": "action_following", "share": 0.985, "tries": 200},
        {"measure": "drift", "early": 40.0, "late": 52.0, "ratio": 1.3, "frames": 5040},
        {"measure": "autoencoder_psnr", "mean": 35.6, "low": 34.6, "high": 36.7, "clips": 100},
    ]  # fmt: skip
    table = evaluation_table(rows)
    assert list(table.columns) == ["measure", "target", "measured"] and len(table) == 6
    assert table["measured"].iloc[0] == "35.60 [34.60, 36.70] dB, 100 clips"
    assert table["measured"].iloc[2] == "2.50 [2.00, 3.00] dB; copy 18.00 dB"
    assert table["measured"].iloc[3] == "98.5 % of 200"
    assert (
        table["measured"].iloc[4].startswith("2.50 [2.00, 3.00] dB, 128 returns; dense 20.00, window 17.50")
    )
    assert table["measured"].iloc[5] == "1.30 (52 / 40), 5040 frames a side"
    assert len(evaluation_table(rows[2:3])) == 1


def test_scenes_have_lines_of_their_own() -> None:
    share = {"share": 0.912, "low": 0.9, "high": 0.92, "clips": 100, "psnr": 28.0}
    rows = [share | {"measure": "shuffled", "share": 0.03},
            share | {"measure": "presence", "real": 0.991, "autoencoder": 0.99, "other_script": 0.05,
                     "by_motion": {"stay": 1.0, "down": 0.75}, "by_actors": {"1 in a shot": 0.9, "2 in a shot": 0.8},
                     "by_size": {"small": 0.5}}]  # fmt: skip
    table = evaluation_table(rows)
    assert table["target"].tolist()[:3] == ["at least 70 %", "at most a third of that", "at least 97 %"]
    assert table["measured"].iloc[0].startswith("91.2 [90.0, 92.0] %, 100 clips; autoencoder 99.0 %, ")
    assert table["measured"].iloc[1].startswith("3.0 [90.0") and table["measured"].iloc[2] == "99.1 %"
    assert table["measured"].tolist()[3:] == [
        "down 75 %, stay 100 %", "2 in a shot 80 %, 1 in a shot 90 %; small 50 %", "28.00 dB"
    ]  # fmt: skip


def test_the_page_names_every_maker_once() -> None:
    row = {"measure": "action_following", "share": 1.0, "tries": 200}
    other = {"measure": "drift", "early": 40.0, "late": 52.0, "ratio": 1.3, "frames": 5040}
    page = evaluation_page([row | {"made": "one"}, other | {"made": "two"}, row | {"made": "one"}])
    assert page.endswith("|\n\nMeasured with one.\n\nMeasured with two.\n") and page.count("one") == 1
    assert "Measured" not in evaluation_page([row])

"""Recorded runs in one file, unpacked where something reads them."""

import shutil
from pathlib import Path

import pytest

from fastar.results import RunStore, load, load_runs
from fastar.results.archive import ARCHIVE, pack, unpack
from fastar.results.record import record_runs


def record(root: Path, *seeds: int) -> Path:
    """`root`/kept with one recorded run for each seed, whose psnr is 30 + seed."""
    store = RunStore(root, "sweep")
    for seed in seeds:
        with store.open({"method": "window"}, seed=seed, labels={"method": "window"}) as run:
            if not run.finished:
                run.log({"psnr": 30.0 + seed}, chunk=0, frame=4)
    record_runs(root / "sweep", root / "kept")
    return root / "kept"


def without_folders(kept: Path) -> list[str]:
    """Leave the archive alone, as in a clone; returns the names of the folders that were there."""
    folders = [path for path in kept.iterdir() if path.is_dir()]
    for path in folders:
        shutil.rmtree(path)
    for path in kept.glob(".runs*"):
        path.unlink()
    return sorted(path.name for path in folders)


def test_a_clone_reads_what_was_recorded(tmp_path: Path) -> None:
    kept = record(tmp_path, 0, 1)
    before = load(kept)
    names = without_folders(kept)
    assert [path.name for path in kept.iterdir()] == [ARCHIVE]
    assert load(kept).equals(before) and set(before["value"]) == {30.0, 31.0}
    assert sorted(path.name for path in kept.iterdir() if path.is_dir()) == names


@pytest.mark.parametrize("pattern", ["kept", "*", "**", "kept/*", "kept/{run}"])
def test_however_the_runs_are_named(tmp_path: Path, pattern: str) -> None:
    kept = record(tmp_path, 0)
    shutil.rmtree(tmp_path / "sweep")
    [name] = without_folders(kept)
    assert load_runs(tmp_path / pattern.format(run=name))["run_id"].item() == name


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    kept = record(tmp_path, 0, 1)
    first = (kept / ARCHIVE).read_bytes()
    names = without_folders(kept)
    unpack(kept)
    pack(kept, [kept / name for name in reversed(names)])
    assert (kept / ARCHIVE).read_bytes() == first


def test_recording_again_keeps_what_is_packed(tmp_path: Path) -> None:
    kept = record(tmp_path, 0)
    without_folders(kept)
    shutil.rmtree(tmp_path / "sweep")
    record(tmp_path, 1)
    assert set(load(kept)["value"]) == {30.0, 31.0}
    without_folders(kept)
    assert set(load(kept)["value"]) == {30.0, 31.0}


def test_a_newer_archive_replaces_what_was_unpacked(tmp_path: Path) -> None:
    """As after a pull: the run is the same, its numbers are not. A folder that was removed comes back."""
    kept = record(tmp_path, 0)
    [name] = without_folders(kept)
    load(kept)
    newer = tmp_path / "newer"
    shutil.copytree(kept, newer)
    table = newer / name / "metrics.parquet"
    with RunStore(tmp_path, "other").open({}, seed=0) as run:
        run.log({"psnr": 7.0}, chunk=0, frame=4)
    shutil.copy(run.folder / "metrics.parquet", table)
    shutil.copy(pack(newer, [newer / name]), kept / ARCHIVE)
    assert load(kept)["value"].item() == 7.0
    shutil.rmtree(kept / name)
    assert load(kept)["value"].item() == 7.0


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    kept = record(tmp_path, 0)
    without_folders(kept)
    whole = (kept / ARCHIVE).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (whole[:middle], b"no archive", flipped):
        (kept / ARCHIVE).write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"runs\.tar\.xz is damaged .*: take it from the repository again"
        ):
            load(kept)
        assert [path.name for path in kept.iterdir() if path.is_dir()] == [], "nothing half unpacked"

"""Video files and pictures for people."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastar.data.video import contact_sheet, read_mp4, read_start, save_png, side_by_side, upscale, write_mp4
from fastar.metrics.fidelity import frame_psnr


def clip(frames: int = 6, height: int = 48, width: int = 64, *, shade: int = 0) -> Tensor:
    """Smooth colours that drift: uint8 [F, H, W, 3]."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    channels = [
        128 + 100 * torch.sin(x / 9 + t / 3),
        128 + 100 * torch.cos(y / 7 - t / 4),
        60.0 + shade + 0 * x,
    ]
    return torch.stack(channels, -1).to(torch.uint8)


def test_round_trip(tmp_path: Path) -> None:
    frames = clip()
    path = write_mp4(tmp_path / "videos/a.mp4", frames, fps=8)
    back = read_mp4(path)
    assert back.shape == frames.shape and back.dtype == torch.uint8
    assert frame_psnr(back, frames).min() > 32
    assert frame_psnr(back, frames).mean() > frame_psnr(back.roll(1, 0), frames).mean() + 5, (
        "frames are out of order"
    )
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_bad_video_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even height and width, got 47 x 64"):
        write_mp4(tmp_path / "a.mp4", clip(height=47))
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "a.mp4", clip().float())
    with pytest.raises(ValueError, match="there is no video"):
        read_mp4(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_mp4(tmp_path / "b.mp4")
    with pytest.raises(ValueError, match="cannot write the video"):
        write_mp4(tmp_path / "b.mp4" / "c.mp4", clip())


def test_upscale_repeats_pixels() -> None:
    small = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    large = upscale(small, 2)
    assert large.shape == (1, 4, 4, 3)
    assert (large[0, :2, :2] == small[0, 0, 0]).all() and (large[0, 2:, 2:] == small[0, 1, 1]).all()


def holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` [h, w, 3] appears somewhere in `picture` [H, W, 3], pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], part.shape[:2])
    return bool((windows == part[..., 0]).all(axis=(-2, -1)).any())


def test_contact_sheet_shows_the_frames_it_says() -> None:
    long, short = clip(9), clip(4, shade=90)
    sheet = np.asarray(contact_sheet({"dense": long, "window": short}, columns=3))
    for frame in (long[0], long[4], long[8], short[0]):
        assert holds(sheet, frame.numpy())
    assert not holds(sheet, long[3].numpy()) and not holds(sheet, short[3].numpy())
    double = contact_sheet({"dense": long}, indices=[2], scale=2)
    assert holds(np.asarray(double), upscale(long[2:3], 2)[0])


def test_side_by_side_keeps_every_video_whole() -> None:
    videos = {"dense": clip(), "tempcache": clip(shade=40), "window": clip(4, shade=90)}
    grid = side_by_side(videos, scale=1)
    assert len(grid) == 6 and grid.shape[1] % 2 == 0 and grid.shape[2] % 2 == 0
    for number in range(6):
        for frames in videos.values():
            if number < len(frames):
                assert holds(grid[number], frames[number].numpy())
    assert not holds(grid[5], clip(shade=90)[3].numpy()), "a video that ended must not look alive"
    assert (grid[0] != grid[5]).any()
    row = side_by_side(videos, columns=3, scale=1)
    assert row.shape[2] > grid.shape[2] and row.shape[1] < grid.shape[1]


def test_captions_differ() -> None:
    one, other = (side_by_side({name: clip(1)}) for name in ("dense", "tempcache, 15 % of dense bytes"))
    assert one.shape == other.shape or (one.shape[2] == other.shape[2])
    assert Image.fromarray(one[0]).tobytes() != Image.fromarray(other[0]).tobytes()


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="one height and width"):
        contact_sheet({"a": clip(), "b": clip(height=50)})
    with pytest.raises(ValueError, match="no videos"):
        side_by_side({})


def test_saved_pictures_are_small_and_look_the_same(tmp_path: Path) -> None:
    noise = torch.randint(-9, 9, (6, 48, 64, 3), generator=torch.Generator().manual_seed(0))
    sheet = contact_sheet({"noisy": (clip().int() + noise).clamp(0, 255).to(torch.uint8)}, scale=2)
    sheet.save(tmp_path / "exact.png", optimize=True)
    save_png(tmp_path / "small.png", sheet)
    assert 2 * (tmp_path / "small.png").stat().st_size < (tmp_path / "exact.png").stat().st_size
    with Image.open(tmp_path / "small.png") as saved:
        back, exact = (torch.from_numpy(np.array(p.convert("RGB")))[None] for p in (saved, sheet))
    assert frame_psnr(back, exact).item() > 30


def test_what_a_video_starts_with_covers_the_size_and_keeps_the_middle(tmp_path: Path) -> None:
    wide = torch.zeros(40, 200, 3, dtype=torch.uint8)
    wide[:, 80:120, 0] = 255
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    [frame] = read_start(tmp_path / "wide.png", height=32, width=32)
    assert frame.shape == (32, 32, 3) and (frame[..., 0] > 240).all(), (
        "the sides are cut, nothing is squeezed"
    )
    write_mp4(tmp_path / "a.mp4", clip())
    assert read_start(tmp_path / "a.mp4", height=24, width=32).shape == (6, 24, 32, 3)
    (tmp_path / "neither.png").write_text("words")
    for name, message in (("neither.png", "cannot be read as a video"), ("nowhere.png", "there is no file")):
        with pytest.raises(ValueError, match=message):
            read_start(tmp_path / name, height=24, width=32)

"""Videos and pictures for people: MP4 in and out, contact sheets, labelled side-by-side videos.

Frames are uint8 [F, H, W, 3], RGB.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

Frames = Tensor | NDArray[np.uint8]

BACKGROUND = (18, 18, 20)
INK = (236, 236, 236)
GAP = 4


def write_mp4(path: str | Path, frames: Frames, *, fps: float = 12.0, crf: int = 17) -> Path:
    """Write H.264 (yuv420p, which every player takes) and return the path; the file appears when it is complete.

    Args:
        frames: [F, H, W, 3] uint8, H and W even.
        crf: x264's quality, 0 (lossless but for the colour subsampling) to 51.

    Raises:
        ValueError: other frames, or the file cannot be written.
    """
    pixels = _checked(frames)
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"H.264 video needs an even height and width, got {height} x {width}: crop, pad or upscale first"
        )
    path = Path(path)
    part = path.with_name(f".{path.stem}.part.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise ValueError(f"cannot write the video {path} ({error.strerror})") from error
    try:
        import imageio_ffmpeg

        writer = imageio_ffmpeg.write_frames(
            str(part), (width, height), fps=fps, codec="libx264", quality=None, macro_block_size=2,
            pix_fmt_out="yuv420p", output_params=["-crf", str(crf), "-movflags", "+faststart"],
        )  # fmt: skip
        writer.send(None)
        try:
            for frame in pixels:
                writer.send(np.ascontiguousarray(frame))
        finally:
            writer.close()
        part.replace(path)
    except OSError as error:
        raise ValueError(f"ffmpeg could not write the video {path}: is the disk full?") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def read_mp4(path: str | Path) -> Tensor:
    """All frames of a video file, uint8 [F, H, W, 3].

    Raises:
        ValueError: there is no such file, or it is no video.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no video {path}")
    try:
        import imageio_ffmpeg

        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        raw = b"".join(reader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a video") from error
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, height, width, 3)


def upscale(frames: Frames, factor: int) -> NDArray[np.uint8]:
    """Nearest-neighbour enlargement by a whole factor: [F, H, W, 3] -> [F, factor * H, factor * W, 3]."""
    return _checked(frames).repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(
    rows: Mapping[str, Frames],
    *,
    columns: int = 8,
    indices: Sequence[int] | None = None,
    first_frame: int = 0,
    scale: int = 1,
    unit: str = "frame",
) -> Image.Image:
    """A picture with one row per video and frames from left to right, both labelled.

    Args:
        rows: label -> [F, H, W, 3]. A video that ended earlier leaves its later places empty.
        columns: frames to show, evenly spread over the longest video (first and last included).
        indices: which frames to show instead.
        first_frame: index that the labels give to frame 0.
        scale: nearest-neighbour enlargement.
        unit: what a column is, in the label of the first.
    """
    videos = {label: _checked(frames) for label, frames in rows.items()}
    height, width = (scale * side for side in _common_size(videos))
    longest = max(len(frames) for frames in videos.values())
    if indices is None:
        indices = np.linspace(0, longest - 1, min(columns, longest)).round().astype(int).tolist()
    font = ImageFont.load_default(size=_font_size(height))
    left = max(_text_size(label, font)[0] for label in videos) + 3 * GAP
    top = _text_size(unit, font)[1] + 3 * GAP
    size = (left + len(indices) * (width + GAP), top + len(videos) * (height + GAP))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, index in enumerate(indices):
        x = left + column * (width + GAP)
        label = f"{unit} {first_frame + index}" if column == 0 else str(first_frame + index)
        draw.text((x + width // 2, top // 2), label, INK, font=font, anchor="mm")
    for row, (label, frames) in enumerate(videos.items()):
        y = top + row * (height + GAP)
        draw.text((left - 2 * GAP, y + height // 2), label, INK, font=font, anchor="rm")
        for column, index in enumerate(indices):
            if index < len(frames):
                sheet.paste(
                    Image.fromarray(upscale(frames[index][None], scale)[0]),
                    (left + column * (width + GAP), y),
                )
    return sheet


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Write a picture in 256 colours: contact sheets have few, and need a third of the bytes."""
    # median cut, the default, makes files twice as large, and where much is of one colour, errors twice as large
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def side_by_side(
    videos: Mapping[str, Frames], *, columns: int | None = None, scale: int = 2
) -> NDArray[np.uint8]:
    """Videos in a grid, each under its caption: [F, H', W', 3] with even sides, F that of the longest.

    A shorter video (a run that failed) goes dark after its last frame and its caption says where it ended.

    Args:
        videos: caption -> [F, H, W, 3], all of one height and width.
        columns: of the grid; by default as square as it gets, wider than high.
        scale: nearest-neighbour enlargement.
    """
    checked = {caption: _checked(frames) for caption, frames in videos.items()}
    height, width = (scale * side for side in _common_size(checked))
    longest = max(len(frames) for frames in checked.values())
    columns = min(columns or int(np.ceil(np.sqrt(len(checked)))), len(checked))
    rows = -(-len(checked) // columns)
    ended = {caption: f"{caption} (ended at {len(frames)})" for caption, frames in checked.items()}
    stopped = [ended[caption] for caption, frames in checked.items() if len(frames) < longest]
    font = _fitting_font([*checked, *stopped], width)
    bar = _text_size("Ag", font)[1] + 2 * GAP
    total = (GAP + rows * (height + bar + GAP), GAP + columns * (width + GAP))
    canvas = np.empty((longest, total[0] + total[0] % 2, total[1] + total[1] % 2, 3), np.uint8)
    canvas[:] = BACKGROUND
    for place, (caption, frames) in enumerate(checked.items()):
        y, x = GAP + place // columns * (height + bar + GAP), GAP + place % columns * (width + GAP)
        canvas[:, y : y + bar, x : x + width] = _caption(caption, width, bar, font)
        canvas[: len(frames), y + bar : y + bar + height, x : x + width] = upscale(frames, scale)
        if len(frames) < longest:
            last = upscale(frames[-1:], scale)[0] // 4 if len(frames) else 0
            canvas[len(frames) :, y + bar : y + bar + height, x : x + width] = last
            canvas[len(frames) :, y : y + bar, x : x + width] = _caption(ended[caption], width, bar, font)
    return canvas


def _checked(frames: Frames) -> NDArray[np.uint8]:
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {array.dtype} {tuple(array.shape)}")
    return array


def _common_size(videos: Mapping[str, NDArray[np.uint8]]) -> tuple[int, int]:
    sizes = {frames.shape[1:3] for frames in videos.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"videos shown together must have one height and width, got {sorted(sizes) or 'no videos'}"
        )
    height, width = sizes.pop()
    return height, width


def _font_size(height: int) -> int:
    return int(np.clip(height // 8, 11, 22))


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return int(right - left), int(bottom - top)


def _fitting_font(captions: Sequence[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font of 9 to 18 pixels in which every caption fits into `width`."""
    for size in range(18, 9, -1):
        font = ImageFont.load_default(size=size)
        if all(_text_size(caption, font)[0] <= width for caption in captions):
            return font
    return ImageFont.load_default(size=9)


def _caption(
    text: str, width: int, height: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> NDArray[np.uint8]:
    bar = Image.new("RGB", (width, height), BACKGROUND)
    ImageDraw.Draw(bar).text((width // 2, height // 2), text, INK, font=font, anchor="mm")
    return np.asarray(bar)


def read_start(path: str | Path, *, height: int, width: int) -> Tensor:
    """Frames of an image (one) or a video file, scaled to cover `height` x `width` and cropped around the centre.

    Returns:
        uint8 [F, height, width, 3].

    Raises:
        ValueError: there is no such file, or it is neither.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            pictures = [image.convert("RGB")]
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except UnidentifiedImageError:
        pictures = [Image.fromarray(frame) for frame in read_mp4(path).numpy()]
    fitted = [ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted]))

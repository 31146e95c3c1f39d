"""Pixels of a Doom world: a headless ViZDoom process that shows the view from any pose.

The pose is computed in Python (camera.py) and set in the engine every frame, by `warp x y` and a turn by the
difference, so that the engine's own physics plays no part.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastar.data.doom.camera import HEIGHT, WIDTH, Pose, move
from fastar.data.doom.maps import World, write_wad
from fastar.interruption import SIGNALS

GAMMA = 1.5  # frames are shown as (pixel / 255) ** (1 / GAMMA): Doom is dark
_SETTLE_TICS = 10  # the engine ignores turns in the first tics of an episode (7 measured)
_TICS = 2  # a frame: the eye is at floor height in the tic of a warp, and back up in the next
_UNSEEN = (
    "hud",
    "weapon",
    "crosshair",
    "messages",
    "decals",
    "particles",
    "effects_sprites",
    "screen_flashes",
)
_GAMMA_TABLE = np.round(255 * (np.arange(256) / 255) ** (1 / GAMMA)).astype(np.uint8)


class View(NamedTuple):
    """image: uint8 [96, 128, 3] (or `frame_size`), RGB. depth: uint8 [192, 256], the engine's coarse code, or None."""

    image: NDArray[np.uint8]
    depth: NDArray[np.uint8] | None


class DoomWorlds:
    """One headless engine process that renders any of `worlds`; use as a context manager or call `close`.

    Starting the process costs about 0.2 s, entering a world 5 ms and a frame 0.5 ms on one core.
    Each instance has its own working directory, because instances race on `./_vizdoom`. `frame_size` is (height, width)
    of the pictures, at most the 192 x 256 that the engine draws, at which they are not anti-aliased.
    """

    def __init__(
        self,
        worlds: Sequence[World],
        *,
        with_depth: bool = False,
        frame_size: tuple[int, int] = (HEIGHT, WIDTH),
    ) -> None:
        self.worlds, self.frame_size = list(worlds), frame_size
        self.world = self.worlds[0]
        self.pose = Pose(0, 0, 0)
        self._entered: int | None = None
        self._with_depth = with_depth
        self._vizdoom, self._cv2 = _import("vizdoom"), _import("cv2")
        self._folder = tempfile.TemporaryDirectory(prefix="fastar-doom-", ignore_cleanup_errors=True)
        write_wad(Path(self._folder.name) / "worlds.wad", self.worlds)
        with _signals_held_back():
            self._game = _start(self._vizdoom, Path(self._folder.name), with_depth)
            self._guard = _guard(Path(self._folder.name))

    def enter(self, index: int, pose: Pose) -> View:
        """Puts the camera into world `index` at `pose` and returns frame 0."""
        world = self.worlds[index]
        if not world.is_free(pose.x, pose.y):
            raise ValueError(f"({pose.x}, {pose.y}) is in or too near a wall of world {index}.")
        if self._entered != index:
            self._game.set_doom_map(f"MAP{index + 1:02d}")
            self._game.new_episode()
            self._game.make_action([0.0], _SETTLE_TICS)
            self._entered = index
        self.world = world
        return self.show(pose)

    def step(self, action: int) -> View:
        """Moves by one action and returns the next frame."""
        return self.show(move(self.world, self.pose, action))

    def show(self, pose: Pose) -> View:
        """Renders the current world from `pose`."""
        view = self.look(pose.x, pose.y, pose.degrees)
        self.pose = pose
        return view

    def look(self, x: int, y: int, degrees: float) -> View:
        """Renders the current world from a place between poses; the camera's `pose` stays what it was."""
        # The engine turns right for a positive number and rounds to 1 / 65,536 of a circle each tic: ask for
        # the difference to the angle it really has, so that errors stay below 0.02 degrees and never add up.
        angle = float(self._game.get_game_variable(self._vizdoom.GameVariable.ANGLE))
        difference = (angle - degrees + 180.0) % 360.0 - 180.0
        self._game.send_game_command(f"warp {x} {y}")
        self._game.make_action([difference / _TICS], _TICS)
        state = self._game.get_state()
        small = self._cv2.resize(
            state.screen_buffer, self.frame_size[::-1], interpolation=self._cv2.INTER_AREA
        )
        depth = state.depth_buffer.copy() if self._with_depth else None
        return View(self._cv2.LUT(small, _GAMMA_TABLE), depth)

    def close(self) -> None:
        """Ends the engine process and removes its folder; safe to call twice."""
        if self._guard is not None:
            self._guard.communicate(
                b"\n"
            )  # not only a closed pipe: a forked worker may hold another end of it
            self._guard = None
        self._game.close()
        self._folder.cleanup()

    def __enter__(self) -> DoomWorlds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"Doom worlds need the package {name}: pip install -e '.[doom]'") from error


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started here never get `SIGNALS`, this one gets them late.

    Slurm signals all processes of a job, and work that is to stop at a safe point needs its engine until then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Working directory for the engine's start: it keeps the one that it is started in."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder`: the engine. Empty where there is no /proc (macOS)."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == folder.resolve():
                found.append(int(link.parent.name))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


def _guard(folder: Path) -> subprocess.Popen[bytes] | None:
    """A shell that ends the engine and removes its folder once it reads a line or this process dies.

    A killed loader worker would otherwise leave its engine behind for ever. The engine is ended outright also
    by `close`: its orderly exit sometimes crashes in static destructors (all frames are out by then; it
    depends on the heap's layout) and spends half a second on a debugger's report.
    """
    engines = _processes_in(folder)
    if not engines:
        return None
    script = 'read _; [ "$(readlink /proc/$1/cwd)" = "$2" ] && kill -9 "$1"; rm -rf "$2"'
    command = ["sh", "-c", script, "sh", str(engines[0]), str(folder.resolve())]
    # A session of its own, so that Ctrl-C does not end the guard before its charge.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _start(vizdoom: ModuleType, folder: Path, with_depth: bool) -> Any:
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(Path(str(vizdoom.__file__)).parent / "freedoom2.wad"))
    game.set_doom_scenario_path(str(folder / "worlds.wad"))
    game.set_doom_map("MAP01")
    # Twice the size of a frame: the 2 x 2 mean is the anti-aliasing that Doom's renderer lacks. At four times the size
    # a frame takes twice as long, and training waits for frames.
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_256X192)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(with_depth)
    for switch in _UNSEEN:
        getattr(game, f"set_render_{switch}")(False)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_console_enabled(False)
    game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_episode_timeout(0)
    with _inside(folder):
        game.init()
    return game

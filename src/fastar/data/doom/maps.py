"""Random Doom worlds: a maze per seed, written as a PWAD that the engine loads over freedoom2.wad.

A model trained on one or two fixed maps learns the map into its weights, and a revisit then tests nothing;
here every episode has its own maze, textures and lights. A maze is a grid of rooms of 192 map units. Rooms
are joined by openings: a random spanning tree (everything can be reached) plus extra openings (there are
circuits).
Format: UDMF text map, zdoom namespace; the engine builds the BSP nodes itself.
https://zdoom.org/wiki/Universal_Doom_Map_Format
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fastar.data.doom.textures import Split, paint

Cell = tuple[int, int]
Edge = tuple[Cell, Cell]

CELL = 192  # map units; the player is 56 high and 32 wide
WALL = 8  # half the thickness of a wall between two rooms
CLEARANCE = 28  # least distance, in map units, between the camera and a wall
WIDE, NARROW = CELL - 2 * WALL, 104  # widths of an opening: the whole side of a room, or a door
SPLIT_OFFSET = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class World:
    """One maze. Immutable and a pure function of (seed, split, cells)."""

    seed: int
    split: Split
    cells: int
    openings: dict[Edge, int]  # edge (lower cell, higher cell) -> width in map units
    ceilings: dict[Cell | Edge, int]  # room or opening -> height above the floor, which is at 0 everywhere
    textmap: str  # the UDMF lump; texture number i is called @i
    num_textures: int

    def textures(self) -> list[bytes]:
        """The world's own textures as PNG files, in the order of their numbers."""
        rng = np.random.default_rng([SPLIT_OFFSET[self.split], self.seed, 1])
        return [_png(paint(rng, self.split)) for _ in range(self.num_textures)]

    def is_free(self, x: float, y: float) -> bool:
        """Whether the camera can stand at map position (x, y) with CLEARANCE to every wall."""
        cell = self.cell_at(x, y)
        u, v = x - CELL * cell[0], y - CELL * cell[1]
        low, high = WALL + CLEARANCE, CELL - WALL - CLEARANCE
        if low <= u <= high and low <= v <= high:
            return True
        if low <= v <= high:  # within reach of the side wall: only in an opening along x
            other, across = (cell[0] + (1 if u > high else -1), cell[1]), v
        elif low <= u <= high:
            other, across = (cell[0], cell[1] + (1 if v > high else -1)), u
        else:
            return False
        width = self.openings.get(_edge(cell, other), 0)
        return abs(across - CELL / 2) <= width / 2 - CLEARANCE

    def line_is_free(self, start: tuple[float, float], end: tuple[float, float], step: float = 8.0) -> bool:
        """Whether the camera can move from `start` to `end` on a straight line, tested every `step` units."""
        length = float(np.hypot(end[0] - start[0], end[1] - start[1]))
        shares = np.linspace(0.0, 1.0, max(2, int(length / step) + 1))
        return all(
            self.is_free(start[0] + s * (end[0] - start[0]), start[1] + s * (end[1] - start[1]))
            for s in shares
        )

    def neighbours(self, cell: Cell) -> list[Cell]:
        """Rooms that can be entered from `cell`, in a fixed order."""
        around = [(cell[0] + dx, cell[1] + dy) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return [other for other in around if _edge(cell, other) in self.openings]

    @staticmethod
    def centre(cell: Cell) -> tuple[float, float]:
        """Map position of the middle of a room."""
        return (cell[0] + 0.5) * CELL, (cell[1] + 0.5) * CELL

    def cell_at(self, x: float, y: float) -> Cell:
        """The room that holds map position (x, y)."""
        top = self.cells - 1
        return min(max(int(x // CELL), 0), top), min(max(int(y // CELL), 0), top)


def make_world(seed: int, *, split: Split = "train", cells: int = 5, extra_openings: float = 0.4) -> World:
    """Draws a maze of `cells` x `cells` rooms; the same arguments give the same bytes.

    `split` picks the families of patterns on the walls (see `fastar.data.doom.textures`) and a disjoint seed stream.
    `extra_openings` is the share of the walls left by the spanning tree that are opened too.
    """
    if split not in SPLIT_OFFSET:
        raise ValueError(f"split must be one of {sorted(SPLIT_OFFSET)}, not {split!r}.")
    if cells < 2:
        raise ValueError(f"cells must be at least 2, not {cells}: a maze of one room has nowhere to go.")
    rng = np.random.default_rng([SPLIT_OFFSET[split], seed])
    openings = _openings(rng, cells, extra_openings)
    ceilings: dict[Cell | Edge, int] = {
        (x, y): int(rng.choice((112, 128, 144, 160))) for x in range(cells) for y in range(cells)
    }
    ceilings.update({edge: 112 if width == WIDE else 96 for edge, width in openings.items()})
    num_textures = int(rng.integers(10, 25))
    textmap = _textmap(rng, num_textures, cells, openings, ceilings)
    return World(seed, split, cells, openings, ceilings, textmap, num_textures)


def write_wad(path: Path, worlds: Sequence[World]) -> None:
    """Writes worlds as maps MAP01, ... of one PWAD (each: empty header lump, TEXTMAP, ENDMAP), then their textures."""
    if not 1 <= len(worlds) <= 99:
        raise ValueError(f"a PWAD holds 1 to 99 worlds here, not {len(worlds)}.")
    lumps: list[tuple[str, bytes]] = []
    textures: list[tuple[str, bytes]] = []
    for number, world in enumerate(worlds, start=1):
        textmap = world.textmap.replace('"@', f'"W{number:02d}T')
        lumps += [(f"MAP{number:02d}", b""), ("TEXTMAP", textmap.encode("ascii")), ("ENDMAP", b"")]
        textures += [(f"W{number:02d}T{i}", png) for i, png in enumerate(world.textures())]
    lumps += [("TX_START", b""), *textures, ("TX_END", b"")]
    offset, directory = 12, []
    for name, data in lumps:
        directory.append(struct.pack("<ii8s", offset, len(data), name.encode("ascii")))
        offset += len(data)
    header = struct.pack("<4sii", b"PWAD", len(lumps), offset)
    path.write_bytes(b"".join([header, *(data for _, data in lumps), *directory]))


def _png(picture: NDArray[np.uint8]) -> bytes:
    """An RGB picture as a PNG file."""
    written: bytes = cv2.imencode(".png", picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    return written


def _edge(a: Cell, b: Cell) -> Edge:
    return (a, b) if a < b else (b, a)


def _openings(rng: np.random.Generator, cells: int, extra: float) -> dict[Edge, int]:
    """Kruskal's spanning tree over randomly ordered walls, then a share `extra` of the rest."""
    edges = [((x, y), (x + 1, y)) for x in range(cells - 1) for y in range(cells)]
    edges += [((x, y), (x, y + 1)) for x in range(cells) for y in range(cells - 1)]
    group = {(x, y): x * cells + y for x in range(cells) for y in range(cells)}
    openings: dict[Edge, int] = {}
    for index in rng.permutation(len(edges)):
        a, b = edges[index]
        joins = group[a] != group[b]
        if joins or rng.random() < extra:
            openings[edges[index]] = WIDE if rng.random() < 0.45 else NARROW
        if joins:
            old = group[b]
            group = {cell: group[a] if value == old else value for cell, value in group.items()}
    return openings


def _passage(edge: Edge, width: int) -> tuple[float, float, float, float]:
    """The strip of floor (x0, y0, x1, y1) inside the wall between two rooms."""
    (ax, ay), (bx, by) = edge
    half = width / 2
    if ax != bx:
        mid = (ay + 0.5) * CELL
        return CELL * bx - WALL, mid - half, CELL * bx + WALL, mid + half
    mid = (ax + 0.5) * CELL
    return mid - half, CELL * by - WALL, mid + half, CELL * by + WALL


class _Lump:
    """Collects the blocks of a TEXTMAP; equal vertices are shared, as the node builder wants it."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.vertices: dict[tuple[float, float], int] = {}
        self.counts = {"sidedef": 0, "sector": 0}

    def add(self, kind: str, **fields: str | float | bool) -> int:
        body = " ".join(f"{key}={_literal(value)};" for key, value in fields.items())
        self.blocks.append(f"{kind}{{{body}}}")
        index = self.counts.get(kind, 0)
        self.counts[kind] = index + 1
        return index

    def vertex(self, x: float, y: float) -> int:
        if (x, y) not in self.vertices:
            self.vertices[x, y] = self.add("vertex", x=float(x), y=float(y))
        return self.vertices[x, y]


def _literal(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _textmap(
    rng: np.random.Generator,
    num_textures: int,
    cells: int,
    openings: dict[Edge, int],
    ceilings: dict[Cell | Edge, int],
) -> str:
    # The first third of the textures is for floors and ceilings, the rest for walls.
    flats = num_textures // 3

    def wall() -> str:
        return f"@{rng.integers(flats, num_textures)}"

    def sector(height: int) -> int:
        floor, ceiling = (f"@{i}" for i in rng.integers(flats, size=2))
        light = int(rng.integers(176, 256))
        return lump.add(
            "sector",
            heightfloor=0,
            heightceiling=height,
            texturefloor=floor,
            textureceiling=ceiling,
            lightlevel=light,
        )

    def side(owner: int, **textures: str) -> int:
        return lump.add("sidedef", sector=owner, offsetx=int(rng.integers(0, 128)), **textures)

    def solid(owner: int, start: tuple[float, float], end: tuple[float, float], texture: str) -> None:
        if start != end:
            ends = {"v1": lump.vertex(*start), "v2": lump.vertex(*end)}
            lump.add("linedef", **ends, sidefront=side(owner, texturemiddle=texture), blocking=True)

    def border(front: int, back: int, start: tuple[float, float], end: tuple[float, float]) -> None:
        ends = {"v1": lump.vertex(*start), "v2": lump.vertex(*end)}
        sides = {"sidefront": side(front, texturetop=wall()), "sideback": side(back, texturetop=wall())}
        lump.add("linedef", **ends, **sides, twosided=True)

    lump = _Lump()
    lump.blocks.append('namespace="zdoom";')
    rooms = {(x, y): sector(ceilings[x, y]) for x in range(cells) for y in range(cells)}
    passages = {edge: sector(ceilings[edge]) for edge in openings}
    for cell, room_sector in rooms.items():
        # Sides clockwise seen from above, so that the room lies to the right of every line (its front).
        x, y = cell
        west, south = CELL * x + WALL, CELL * y + WALL
        east, north = west + WIDE, south + WIDE
        corners = [(west, south), (west, north), (east, north), (east, south)]
        for index, other in enumerate(((x - 1, y), (x, y + 1), (x + 1, y), (x, y - 1))):
            start, end = corners[index], corners[(index + 1) % 4]
            edge = _edge(cell, other)
            texture = wall()
            if edge not in openings:
                solid(room_sector, start, end, texture)
                continue
            share = (1 - openings[edge] / WIDE) / 2
            near = (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
            far = (end[0] - share * (end[0] - start[0]), end[1] - share * (end[1] - start[1]))
            solid(room_sector, start, near, texture)
            border(room_sector, passages[edge], near, far)
            solid(room_sector, far, end, texture)
    for edge, width in openings.items():
        x0, y0, x1, y1 = _passage(edge, width)
        along_x = edge[0][0] != edge[1][0]
        jambs = (
            [((x0, y1), (x1, y1)), ((x1, y0), (x0, y0))]
            if along_x
            else [((x0, y0), (x0, y1)), ((x1, y1), (x1, y0))]
        )
        for jamb_start, jamb_end in jambs:
            solid(passages[edge], jamb_start, jamb_end, wall())
    start_x, start_y = World.centre((0, 0))
    single, skills = {"single": True}, {f"skill{level}": True for level in range(1, 6)}
    lump.add("thing", x=start_x, y=start_y, angle=0, type=1, **single, **skills)
    return "\n".join(lump.blocks)

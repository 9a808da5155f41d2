"""What ``csrc/conv_bn_act/gemm_tiles.h`` says of the tiles, said again: which one a call gets, and what it then moves.

``test_conv_bn_act_gemm.py`` holds it against what the executor launches and counts; the tables in
``csrc/conv_bn_act/README.md`` are made of it (``PYTHONPATH=tests python tests/conv_gemm.py`` prints them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from conv_tile_cases import GEOMETRIES, Case, case_of
from cuda_gate.gate import OLDEST_GEMM_ARCH, Budget, read_budget

TILES = [(128, 128), (256, 64), (128, 64), (64, 64), (128, 32)]  # rows, columns
DEPTH = 32  # of a piece
MOVE = 64  # multiplications in the time that moving one number takes
EPILOGUE_ROWS = 64  # that an evaluation finishes at once


def up(value: int, to: int) -> int:
    return -(-value // to)


@dataclass(frozen=True)
class Shape:
    """One convolution; sizes of the output are those of the input over the stride, as with half padding."""

    name: str
    batch: int
    size: int  # H, W
    channels: int
    out_channels: int
    filter_size: int
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.filter_size // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.filter_size) // self.stride + 1

    @property
    def rows(self) -> int:
        return self.batch * self.out_size**2

    @property
    def depth(self) -> int:
        return self.filter_size**2 * self.channels

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.out_channels * self.depth

    @property
    def compulsory(self) -> int:
        """Bytes of x, the weights and y, each once."""
        x = self.batch * self.size**2 * self.channels
        if self.stride >= self.filter_size:
            x = self.rows * self.depth  # the rest nobody needs
        return 2 * (x + self.out_channels * self.depth + self.rows * self.out_channels)

    def tile(self, multiprocessors: int) -> tuple[int, int]:
        return tile_of(self.rows, self.out_channels, multiprocessors)

    def blocks(self, tile: tuple[int, int]) -> int:
        return up(self.rows, tile[0]) * up(self.out_channels, tile[1])

    def copied(self, tile: tuple[int, int]) -> int:
        """Bytes from global to shared memory: rows once for each column tile, weights once for each row tile."""
        in_image = sum(
            0 <= out * self.stride - self.padding + tap < self.size
            for out in range(self.out_size)
            for tap in range(self.filter_size)
        )
        x = self.batch * in_image**2 * self.channels * up(self.out_channels, tile[1])
        return 2 * (x + self.out_channels * self.depth * up(self.rows, tile[0]))

    def moved(self, tile: tuple[int, int]) -> int:
        """Bytes between the multiprocessors and what lies beyond them, the L2 cache first."""
        return self.copied(tile) + 2 * self.rows * self.out_channels


def tile_of(rows: int, columns: int, multiprocessors: int) -> tuple[int, int]:
    """The tile with which the multiprocessor that has most to do is done first; 0: unknown how many there are."""

    def cost(tile: tuple[int, int]) -> int:
        tiles = up(rows, tile[0]) * up(columns, tile[1])
        rounds = up(tiles, multiprocessors) if multiprocessors else tiles
        return rounds * (tile[0] * tile[1] + MOVE * (tile[0] + tile[1]))

    return min(TILES, key=cost)  # of equals the first


def shapes() -> list[Shape]:
    """The convolutions of ResNet-18's and ResNet-50's blocks, 64 images of 224 x 224, and of the course CNN."""
    found = [Shape("course CNN", 64, 14, 32, 64, 3)]
    for size, width in ((56, 64), (28, 128), (14, 256), (7, 512)):
        if width > 64:
            found.append(Shape("ResNet-18", 64, 2 * size, width // 2, width, 3, 2))
            found.append(Shape("ResNet-50", 64, 2 * size, width, width, 3, 2))
            found.append(Shape("ResNet-50", 64, 2 * size, 2 * width, 4 * width, 1, 2))
        found.append(Shape("ResNet-18, 50", 64, size, width, width, 3))
        found.append(Shape("ResNet-50", 64, size, 4 * width, width, 1))
        found.append(Shape("ResNet-50", 64, size, width, 4 * width, 1))
    return found


# ---- calls that get a certain tile -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forced:
    """A tile, the output pixels (N, P, Q) of a call that gets it, with its last tile incomplete, and the device."""

    rows: int
    columns: int
    output: tuple[int, int, int]
    out_channels: tuple[int, ...]  # whole packs, and none
    multiprocessors: int

    @property
    def name(self) -> str:
        return f"conv_bn_act_{self.rows}x{self.columns}"

    def case(self, geometry: str, **options: Any) -> Case:
        """Of the images that lead to these output pixels."""
        given = {"filter_size": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
        given |= GEOMETRIES[geometry]
        (r, s), (stride, step), (top, bottom, left, right), (dy, dx) = given.values()
        n, p, q = self.output
        height = (p - 1) * stride + (r - 1) * dy + 1 - top - bottom
        width = (q - 1) * step + (s - 1) * dx + 1 - left - right
        return case_of({"geometry": geometry, **options}, image=(n, height, width))


FORCED = [
    Forced(128, 128, (1, 12, 13), (120, 67), 1),
    Forced(256, 64, (1, 15, 16), (40, 37), 1),
    Forced(128, 64, (2, 12, 12), (64, 37), 1),
    Forced(64, 64, (1, 11, 12), (72, 67), 1000),
    Forced(128, 32, (2, 9, 11), (32, 3, 24), 1),
]


# ---- the tables of the README ---------------------------------------------------------------------------------------

ARCHS = {"sm_80": (80,), "sm_86, 89, 120": (86, 89, 120), "sm_90, 100": (90, 100)}  # alike in shared memory
MULTIPROCESSORS = 108  # of an A100


def tiles_table() -> str:
    """What a multiprocessor has room for, by the committed budget, in Markdown."""
    found: dict[tuple[int, ...], dict[tuple[str, int], list[Budget]]] = {}
    for key, limits in read_budget().items():
        match = re.search(r"^implicit_gemm<\w+, Tile<(\d+(?:, \d+)*)>, \(ConvResult\)(\d)", key.kernel)
        if match and key.arch >= OLDEST_GEMM_ARCH:
            tile = tuple(map(int, match[1].split(", ")))
            found.setdefault(tile, {}).setdefault((match[2], key.arch), []).append(limits)
    lines = [f"| tile | of a warp | pieces | shared, KiB | registers | {' | '.join(ARCHS)} |", "|" + " --- |" * 8]
    for tile, budgets in sorted(found.items(), key=lambda item: TILES.index(item[0][:2])):
        rows, columns, warp_rows, warp_columns, pieces, _ = tile
        blocks = [
            " / ".join(str(min(b.blocks_per_sm for arch in archs for b in budgets[kind, arch])) for kind in "01")
            for archs in ARCHS.values()
        ]
        cells = (
            f"{rows} x {columns}",
            f"{warp_rows} x {warp_columns}",
            pieces,
            pieces * (rows + columns) * DEPTH * 2 // 1024,
            max(b.registers for same in budgets.values() for b in same),
            *blocks,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table() -> str:
    """What is moved, in Markdown."""
    head = ("block", "x", "filter, stride", "K", "tile", "blocks", "op / byte", "moved / compulsory", "op / moved byte")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for shape in shapes():
        tile = shape.tile(MULTIPROCESSORS)
        cells = (
            shape.name,
            f"{shape.batch} x {shape.size} x {shape.size} x {shape.channels}",
            f"{shape.filter_size} x {shape.filter_size}, {shape.stride}",
            shape.out_channels,
            f"{tile[0]} x {tile[1]}",
            shape.blocks(tile),
            round(shape.operations / shape.compulsory),
            f"{shape.moved(tile) / shape.compulsory:.1f}",
            round(shape.operations / shape.moved(tile)),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tiles_table(), table(), sep="\n\n")

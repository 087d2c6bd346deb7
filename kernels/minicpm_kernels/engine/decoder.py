"""A model in compiled form: weights, cache and scratch in three allocations, and the call that runs a step.

Everything is allocated when a `CompiledDecoder` is made and nothing afterwards. Python's part of a step is to write
down which tokens go where (`Segment`) into arrays whose addresses the step knows, and to ring the bell.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_kernels.engine.attention import (
    ATTEND,
    BLOCKS,
    ELEMENT,
    PART,
    PLACE,
    POSITIONS,
    TAIL,
    part_function,
    place_function,
)  # fmt: skip
from minicpm_kernels.engine.compiling import Progress, compile_address, compile_function, reporting
from minicpm_kernels.engine.embedding import READ, row_reader
from minicpm_kernels.engine.formats import ROWS, find_format, padded
from minicpm_kernels.engine.instruction_sets import supported
from minicpm_kernels.engine.memory import allocate
from minicpm_kernels.engine.operands import LOG2_E, WRITE, operand_writer
from minicpm_kernels.engine.products import MATMUL, matrix_product, tile_size
from minicpm_kernels.engine.state import STATE, UNIT
from minicpm_kernels.engine.step import SERVE, serve
from minicpm_kernels.engine.threads import CONTROL, Workers
from minicpm_kernels.engine.weights import LayerMatrices, Matrix, operand_columns, pack_model

PRIVATE = 2  # tokens up to which each thread normalizes for itself
UNIT_ROWS = 48  # query rows that a unit of attention takes together
ALIGN = 128  # bytes: two cache lines, which are fetched as a pair


@dataclass(frozen=True)
class Sizes:
    """What a model is made of."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    embedding_scale: float
    residual_scale: float
    logit_divisor: float


@dataclass(frozen=True)
class Segment:
    """New tokens of one row of the cache, behind `past` tokens; `parents` if they are a draft tree; `long`: turned by
    LongRoPE's second list of angles."""

    row: int
    ids: Sequence[int]
    past: int
    long: bool = False
    parents: Sequence[int] | None = None

    @property
    def positions(self) -> list[int]:
        """Where each token stands in its sequence."""
        if self.parents is None:
            return list(range(self.past, self.past + len(self.ids)))
        found: list[int] = []
        for parent in self.parents:
            found.append(self.past if parent < 0 else found[parent] + 1)
        return found


class CompiledDecoder:
    """A decoder whose step is compiled.

    `layers` is read once, matrix after matrix; `norms` [2 layers + 1, C]; `embedding` None means that `head` is it;
    `angles` [2 (short, long), S, 2 (cos, sin), D/2] for as many positions as a row of the cache is to have.
    `room` bounds the tokens of a step, `wanted_room` those whose logits are asked for. `threads` None: as many as a
    step is fastest with. `progress` is called with a line for each function that is compiled or loaded.
    """

    def __init__(
        self,
        sizes: Sizes,
        layers: Iterable[LayerMatrices],
        norms: NDArray[np.float32],
        head: Matrix,
        embedding: Matrix | None,
        angles: NDArray[np.float32],
        form: str = "float32",
        head_form: str | None = None,
        cache_element: str = "float16",
        batch: int = 1,
        room: int = 64,
        wanted_room: int = 64,
        capture_layers: Sequence[int] = (),
        threads: int | None = None,
        instruction_set: str | None = None,
        progress: Progress | None = None,
    ):
        self.sizes, self.batch, self.room, self.wanted_room = sizes, batch, room, wanted_room
        self.form, self.head_form = find_format(form), find_format(head_form or form)
        self.instruction_set = instruction_set or supported()[0]
        self.capture_layers = tuple(capture_layers)
        self._most_threads = threads or len(os.sched_getaffinity(0))
        self._states = np.zeros(1, STATE)
        self._state = self._states[0]
        self._compile(cache_element, progress)
        self._set_sizes(angles.shape[1], cache_element)
        self._load(layers, norms, head, embedding, angles)
        self._allocate_cache(cache_element)
        self._allocate_scratch()
        self._control = allocate(8 * CONTROL * (self._most_threads + 4)).view(np.int64)
        self._control[:] = 0
        self._workers: Workers | None = None
        self._start(threads or self._fastest_threads())

    # ---- a step ------------------------------------------------------------------------------------------------------

    def run(self, segments: Sequence[Segment], wanted: Sequence[int]) -> NDArray[np.float32]:
        """Run the tokens of all segments, laid end to end, through the layers; logits [wanted, V] of some of them.

        What is returned is the decoder's own memory and holds until the next call.
        """
        s, call, start = self._state, self._call, 0
        parts = []
        for segment in segments:
            stop = start + len(segment.ids)
            call["ids"][start:stop] = segment.ids
            call["rows"][start:stop] = segment.row
            call["slots"][start:stop] = range(segment.past, segment.past + len(segment.ids))
            call["positions"][start:stop] = segment.positions
            call["long"][start:stop] = segment.long
            if segment.parents is not None:
                call["parents"][start:stop] = [parent + start if parent >= 0 else -1 for parent in segment.parents]
            parts.append((start, segment))
            start = stop
        self.tokens = start
        call["wanted"][: len(wanted)] = wanted
        s["tokens"], s["wanted"] = start, len(wanted)
        for prefix, count, form in (("", start, self.form), ("head_", len(wanted), self.head_form)):
            s[f"{prefix}tile_count"] = _tiles(call[f"{prefix}tiles"], count, tile_size(self.instruction_set, form.name))
        self._set_units(parts)
        assert self._workers is not None
        self._workers.call()
        self._serve(self._states, self._control, self._workers.count, 0)
        return self._logits[: len(wanted), : self.sizes.vocab]

    def captured(self) -> NDArray[np.float32]:
        """The residual streams [captured layers, tokens, C] of the last call."""
        count = len(self.capture_layers)
        flat = self._captured[: count * self.tokens * self._state["stride"]]
        return flat.reshape(count, self.tokens, -1)[:, :, : self.sizes.width]

    def move(self, row: int, source: Sequence[int], target: int) -> None:
        """Copy a row's tokens from the ascending places `source` to target, target + 1, ..."""
        if list(source) == list(range(target, target + len(source))):
            return
        old, new = np.asarray(source), np.arange(target, target + len(source))
        keys, values = self.keys[:, row], self.values[:, row]
        keys[:, :, new // POSITIONS, :, new % POSITIONS] = keys[:, :, old // POSITIONS, :, old % POSITIONS]
        values[:, :, new // POSITIONS, new % POSITIONS] = values[:, :, old // POSITIONS, old % POSITIONS]

    def turn_keys(self, row: int, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """Rotate a row's first keys by angles whose cos and sin are [tokens, D/2]."""
        half = self.sizes.head_dim // 2
        for block in range(-(-len(cos) // POSITIONS)):
            here = slice(block * POSITIONS, min((block + 1) * POSITIONS, len(cos)))
            keys = self.keys[:, row, :, block, :, : here.stop - here.start]  # [layers, kv heads, D, positions]
            first, second = (keys[:, :, i * half : (i + 1) * half].astype(np.float32) for i in (0, 1))
            c, s = cos[here].T, sin[here].T
            keys[:, :, :half], keys[:, :, half : 2 * half] = first * c - second * s, second * c + first * s

    def close(self) -> None:
        """End the threads."""
        if self._workers is not None:
            self._workers.close()

    @property
    def threads(self) -> int:
        """How many threads a step runs on."""
        assert self._workers is not None
        return self._workers.count

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of weights, cache and scratch."""
        return {
            "weights": self._stream.data.nbytes + self._norms.nbytes,
            "cache": self.keys.nbytes + self.values.nbytes,
            "scratch": self._scratch.nbytes + self._angles.nbytes,
        }

    # ---- building ----------------------------------------------------------------------------------------------------

    def _compile(self, element: str, progress: Progress | None) -> None:
        """Compile or load all functions, and note the addresses of those that are exchanged for one another."""
        isa, s = self.instruction_set, self._state
        with reporting(progress):
            self._code = []

            def address(name: str, signature: object, function: object) -> int:
                compiled = compile_address(name, signature, function)
                self._code.append(compiled)  # machine code lives as long as its object
                return compiled.address

            for prefix, form in (("", self.form), ("head_", self.head_form)):
                if prefix and form == self.form:
                    s["head_matmul_at"], s["head_write_at"] = s["matmul_at"], s["write_at"]
                    continue
                product, writer = matrix_product(isa, form.name), operand_writer(form.name)
                s[f"{prefix}matmul_at"] = address(f"matmul_{isa}_{form.name}", MATMUL, product)
                s[f"{prefix}write_at"] = address(f"write_{form.name}", WRITE, writer)
            name = self.head_form.name
            s["read_at"] = address(f"read_{isa}_{name}", READ, row_reader(isa, name))
            s["attend_at"] = address(f"attend_{isa}_{element}", ATTEND, part_function(isa, element))
            s["place_at"] = address(f"place_{isa}_{element}", PLACE, place_function(isa, element))
            self._serve = compile_function("serve", SERVE, serve)

    def _set_sizes(self, positions: int, element: str) -> None:
        z, s = self.sizes, self._state
        for name in ("layers", "heads", "kv_heads", "head_dim", "width", "eps", "embedding_scale", "residual_scale"):
            s[name] = getattr(z, name)
        s["head_dim_padded"] = padded(z.head_dim, POSITIONS)
        s["stride"] = operand_columns(z.width, self.form, self.head_form)
        s["attended_stride"] = operand_columns(z.heads * z.head_dim, self.form)
        s["ffn"] = operand_columns(z.ffn, self.form)
        s["qkv_rows"] = padded((z.heads + 2 * z.kv_heads) * z.head_dim, ROWS)
        s["width_rows"], s["vocab_rows"] = padded(z.width, ROWS), padded(z.vocab, ROWS)
        s["group"], s["head_group"] = self.form.group, self.head_form.group
        s["batch"], s["blocks"] = self.batch, -(-positions // POSITIONS)
        s["element"], s["private"], s["positions"] = ELEMENT[element], PRIVATE, positions
        s["head_scale"], s["query_scale"] = 1 / z.logit_divisor, LOG2_E / math.sqrt(z.head_dim)

    def _load(
        self,
        layers: Iterable[LayerMatrices],
        norms: NDArray[np.float32],
        head: Matrix,
        embedding: Matrix | None,
        angles: NDArray[np.float32],
    ) -> None:
        z, s = self.sizes, self._state
        widths = int(s["stride"]), int(s["attended_stride"]), int(s["ffn"])
        self._stream = pack_model(layers, z.layers, head, embedding, self.form, self.head_form, *widths)
        self._norms = np.zeros((2 * z.layers + 1, widths[0]), np.float32)
        self._norms[:, : z.width] = norms
        self._angles = np.ascontiguousarray(angles, np.float32)
        self._places = np.full(z.layers + 1, -1, np.int64)
        self._places[list(self.capture_layers)] = range(len(self.capture_layers))
        for name, array in (
            ("stream_at", self._stream.data), ("offsets_at", self._stream.offsets), ("norms_at", self._norms),
            ("angles_at", self._angles), ("captured_layers_at", self._places),
        ):  # fmt: skip
            s[name] = array.ctypes.data

    def _allocate_cache(self, element: str) -> None:
        z, s = self.sizes, self._state
        padded_dim, kind = int(s["head_dim_padded"]), np.dtype(element)
        shape = (z.layers, self.batch, z.kv_heads, int(s["blocks"]))
        size = math.prod(shape) * padded_dim * POSITIONS * kind.itemsize
        keys, values = (allocate(size).view(kind) for _ in range(2))
        # for Python: [layers, batch, kv heads, blocks] and then [D, 16 positions] and [16 positions, D / 16, 16]
        self.keys = keys.reshape(*shape, padded_dim, POSITIONS)
        self.values = values.reshape(*shape, padded_dim // POSITIONS, POSITIONS, POSITIONS).swapaxes(-3, -2)
        s["keys_at"], s["values_at"] = keys.ctypes.data, values.ctypes.data

    def _allocate_scratch(self) -> None:
        """Everything that lives for one step, laid out in one allocation."""
        z, s, room = self.sizes, self._state, self.room
        stride, attended, ffn, wide = (int(s[name]) for name in ("stride", "attended_stride", "ffn", "head_dim_padded"))
        heads = z.heads // z.kv_heads
        unit_rows = heads * max(1, UNIT_ROWS // heads)
        columns = max(stride, attended)
        column_bytes = max(4 if form.is_float else 1 for form in (self.form, self.head_form))
        group = min(self.form.group, self.head_form.group)
        block = wide * POSITIONS * int(s["element"])
        self._state_room = max(8 * self._most_threads, -(-self._state["positions"] // PART)) * z.kv_heads
        own = _Layout()
        own.add("own_first", 4 * max(stride, ffn, wide))  # an activation, at place 0
        own.add("own_scores", 4 * unit_rows * PART)
        own.add("own_part", 4 * unit_rows * (wide + TAIL))
        own.add("own_total", 4 * unit_rows * (wide + TAIL))
        own.add("own_counts", 8 * unit_rows)
        own.add("own_blocks", 16 * BLOCKS)
        own.add("own_gather", 2 * block * (self.wanted_room // POSITIONS + 2 + BLOCKS))
        s["own_bytes"] = own.end
        for name, offset in own.offsets.items():
            if name != "own_first":
                s[name] = offset
        s["operand_bytes"] = padded(PRIVATE * columns * column_bytes, ALIGN)
        s["scales_bytes"] = padded(4 * PRIVATE * columns // group, ALIGN)
        tokens = max(room, self.wanted_room)
        all_ = _Layout()
        all_.add("x_at", 4 * tokens * stride)
        all_.add("attended_at", 4 * tokens * attended)
        all_.add("captured_at", 4 * tokens * stride * len(self.capture_layers))
        all_.add("qkv_at", 4 * tokens * int(s["qkv_rows"]))
        all_.add("queries_at", 4 * tokens * z.heads * wide)
        all_.add("gate_up_at", 8 * tokens * ffn)
        all_.add("out_at", 4 * tokens * int(s["width_rows"]))
        all_.add("states_at", 4 * self._state_room * heads * (wide + TAIL))
        all_.add("operand_at", self._most_threads * int(s["operand_bytes"]) + tokens * columns * column_bytes)
        for name in ("scales_at", "sums_at"):
            all_.add(name, self._most_threads * int(s["scales_bytes"]) + 4 * tokens * columns // group)
        all_.add("hidden_at", tokens * ffn * column_bytes)
        all_.add("hidden_scales_at", 4 * tokens * ffn // group)
        all_.add("hidden_sums_at", 4 * tokens * ffn // group)
        all_.add("own_at", self._most_threads * own.end)
        all_.add("logits_at", 4 * self.wanted_room * int(s["vocab_rows"]))
        for name in ("ids", "rows", "slots", "positions", "long", "parents", "wanted"):
            all_.add(f"{name}_at", 8 * tokens)
        for name in ("tiles", "head_tiles"):
            all_.add(f"{name}_at", 16 * tokens)
        self._unit_room = max(self._state_room, tokens * z.kv_heads)
        all_.add("units_at", 8 * UNIT * self._unit_room)
        self._scratch = allocate(all_.end)
        self._scratch[:] = 0  # what fills operands up to a group stays zero for good
        base = self._scratch.ctypes.data
        for name, offset in all_.offsets.items():
            s[name] = base + offset

        def view(name: str, kind: type, count: int) -> NDArray:
            start = all_.offsets[f"{name}_at"]
            return self._scratch[start : start + count * np.dtype(kind).itemsize].view(kind)

        names = ("ids", "rows", "slots", "positions", "long", "parents", "wanted")
        self._call = {name: view(name, np.int64, tokens) for name in names}
        self._call |= {name: view(name, np.int64, 2 * tokens).reshape(-1, 2) for name in ("tiles", "head_tiles")}
        self._call["units"] = view("units", np.int64, UNIT * self._unit_room).reshape(-1, UNIT)
        self._captured = view("captured", np.float32, tokens * stride * len(self.capture_layers))
        count = self.wanted_room * int(s["vocab_rows"])
        self._logits = view("logits", np.float32, count).reshape(self.wanted_room, -1)

    def _set_units(self, parts: Sequence[tuple[int, Segment]]) -> None:
        """Divide the attention of a call into units, which threads take in turn (see `step._attend`)."""
        heads = self.sizes.kv_heads
        most = max(1, UNIT_ROWS // (self.sizes.heads // heads))
        units: list[tuple[int, ...]] = []
        for start, segment in parts:
            tree = segment.parents is not None
            count = 1 if tree else most
            positions = segment.positions if tree else None
            for first in range(0, len(segment.ids), count):
                n = min(count, len(segment.ids) - first)
                last = positions[first] if positions is not None else segment.past + first + n - 1
                for head in range(heads):
                    units.append((start + first, n, head, 0, last // PART + 1, segment.past if tree else -1))
        s = self._state
        alone = all(unit[1] == 1 for unit in units)
        total = sum(unit[4] for unit in units)
        split = alone and len(units) < 2 * self._threads and len(units) < total <= self._state_room
        if split:
            units = [(*unit[:3], part, 1, unit[5]) for unit in units for part in range(unit[4])]
        s["unit_count"], s["split"] = len(units), split
        self._call["units"][: len(units)] = units

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _start(self, threads: int) -> None:
        self.close()
        self._threads = threads
        self._workers = Workers(threads, self._control, self._serve, (self._states, self._control, threads))

    def _fastest_threads(self) -> int:
        """Measure a step of one token with one thread, two, four, ... and take the fastest count."""
        counts = [1 << i for i in range(self._most_threads.bit_length()) if 1 << i < self._most_threads]
        found = {}
        for count in [*counts, self._most_threads]:
            self._start(count)
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                self.run([Segment(0, [0], 0)], [0])
                seconds.append(time.perf_counter() - start)
            found[count] = min(seconds)
        return min(found, key=lambda count: found[count])


class _Layout:
    """Places one behind the other, each at the start of a cache line."""

    def __init__(self) -> None:
        self.end, self.offsets = 0, dict[str, int]()

    def add(self, name: str, size: int) -> None:
        """Reserve `size` bytes."""
        self.offsets[name] = self.end
        self.end += padded(int(size), ALIGN)


def _tiles(out: NDArray[np.int64], count: int, most: int) -> int:
    """Cut `count` tokens into tiles [first, tokens] of at most `most`, as equal as can be; returns how many."""
    tiles = -(-count // most)
    bounds = [count * i // tiles for i in range(tiles + 1)] if tiles else [0]
    out[:tiles, 0] = bounds[:-1]
    out[:tiles, 1] = np.diff(bounds)
    return tiles

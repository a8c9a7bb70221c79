"""One shard with random weights and one number of tokens: what `tune_kernels.py` times and checks.

H hidden size, I intermediate size, K pairs of a token, A sorted positions, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expert_service.kernels.triton import reference
from expert_service.kernels.triton.matrices import FP8, ExpertMatrices, scale_shape
from expert_service.kernels.triton.products.down import down
from expert_service.kernels.triton.products.gate_up import gate_up
from expert_service.kernels.triton.products.quantize import Rows, quantize
from expert_service.kernels.triton.products.route import Route, route, route_later
from expert_service.kernels.triton.tables.tables import TileTable
from expert_service.kernels.triton.tables.tiles import Tile

_ROUTINGS = 4  # in turn, so that few tokens do not find their experts in the cache
_MANY_TOKENS = 256  # above, each routing meets every expert, and more weights than a cache holds
_TOLERANCE = 2e-2  # of the largest value: bf16 in, float32 sums, bf16 out
_TOLERANCE_FP8 = 8e-2  # e4m3 out: a step is an eighth of a value, and half of it may be lost


def make_matrices(table: TileTable, device: str, dtype: torch.dtype) -> ExpertMatrices:
    """Random weights for a table's shard: FP8, or of `dtype`, as its precision says."""
    hidden, size = table.hidden_size, table.intermediate_size
    shapes = ((size, hidden), (size, hidden), (hidden, size))
    is_fp8 = table.precision in ("w8a16", "w8a8")
    factor = 50.0 if is_fp8 else 1.0  # FP8 has few numbers near zero

    def matrix(rows: int, columns: int) -> torch.Tensor:
        kind = FP8 if is_fp8 else dtype
        made = torch.empty(table.experts, rows, columns, dtype=kind, device=device)
        for each in made:  # one at a time: all of them take four times the memory in float32
            each.copy_(torch.randn(rows, columns, device=device) * factor / columns**0.5)
        return made

    weights = [matrix(*shape) for shape in shapes]
    if is_fp8:
        scales = [torch.rand(table.experts, *scale_shape(*shape)) for shape in shapes]
        weights += [(each.to(device) + 0.5) / factor for each in scales]
    return ExpertMatrices(*weights)


class Case:
    """Inputs of both products, and what torch says of their first routing."""

    def __init__(
        self, matrices: ExpertMatrices, table: TileTable, tokens: int, dtype: torch.dtype
    ) -> None:
        device = matrices.gate_LIH.device
        self._matrices = matrices
        self._dtype = dtype
        self._w8a8 = table.precision == "w8a8"
        self._x = self._rows(torch.randn(tokens, table.hidden_size, device=device))
        routings = _ROUTINGS if tokens <= _MANY_TOKENS else 2
        scores = torch.rand(routings, tokens, table.experts, device=device)
        self._ids = scores.topk(table.top_k, dim=2).indices.to(torch.int32)
        self._weights = torch.rand(tokens, table.top_k, device=device)
        self._sorted: dict[int, tuple[list[Route], list[Rows]]] = {}
        self._expected: dict[tuple[str, int], torch.Tensor] = {}

    def runs(self, product: str, tile: Tile) -> list[Callable[[], torch.Tensor]]:
        """The product with that tile, on each routing."""
        routes, intermediates = self._sorted_for(tile.block_m)

        def first(routed: Route) -> torch.Tensor:
            return gate_up(self._x, self._matrices, routed, tile).values_NC

        def second(routed: Route, h: Rows) -> torch.Tensor:
            return down(h, self._matrices, self._weights, routed, tile, self._dtype)

        if product == "gate_up":
            return [lambda routed=routed: first(routed) for routed in self._first_routes(routes)]
        return [
            lambda routed=routed, h=h: second(routed, h)
            for routed, h in zip(routes, intermediates, strict=True)
        ]

    def is_right(self, product: str, tile: Tile) -> bool:
        """Whether the first routing's rows are torch's."""
        routes, _ = self._sorted_for(tile.block_m)
        tolerance = _TOLERANCE
        if product == "gate_up":
            routed = self._first_routes(routes)[0]
            h = gate_up(self._x, self._matrices, routed, tile)  # which may fill the route in
            actual = _taken(h, routed.positions.flatten().long())
            tolerance = _TOLERANCE_FP8 if self._w8a8 else _TOLERANCE
        else:
            actual = self.runs(product, tile)[0]()[routes[0].positions.flatten().long()].float()
        expected = self._expected[product, tile.block_m]
        return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())

    def _first_routes(self, routes: list[Route]) -> list[Route]:
        """What the first product is given: as the experts do it, one row sorts its own pairs."""
        if len(self._weights) > 1:
            return routes
        return [route_later(ids, each.num_slots, each.block_m)
                for ids, each in zip(self._ids, routes, strict=True)]  # fmt: skip

    def _rows(self, values: torch.Tensor) -> Rows:
        return quantize(values) if self._w8a8 else Rows(values.to(self._dtype))

    def _sorted_for(self, block_m: int) -> tuple[list[Route], list[Rows]]:
        """Each routing sorted into blocks of that many rows, and any h in that order."""
        if block_m not in self._sorted:
            slots, size, _ = self._matrices.gate_LIH.shape
            routes = [route(ids, slots, block_m) for ids in self._ids]
            device = self._weights.device
            shape = (len(routes[0].pairs), size)
            intermediates = [self._rows(torch.randn(*shape, device=device)) for _ in routes]
            self._sorted[block_m] = routes, intermediates
            self._expect(routes[0], intermediates[0])
        return self._sorted[block_m]

    def _expect(self, routed: Route, h: Rows) -> None:
        """What torch makes of each pair, expert by expert."""
        positions = routed.positions.flatten().long()
        slots = routed.block_slots[positions // routed.block_m]
        firsts, seconds, order = [], [], []
        for slot in slots.unique().tolist():
            pairs = (slots == slot).nonzero()[:, 0]
            gate, up, down_w = self._expert(slot)
            x = _taken(self._x, pairs // self._weights.shape[1])
            firsts.append(torch.nn.functional.silu(x @ gate.T) * (x @ up.T))
            weight = self._weights.flatten()[pairs, None]
            seconds.append(weight * (_taken(h, positions[pairs]) @ down_w.T))
            order.append(pairs)
        back = torch.cat(order).argsort()
        self._expected["gate_up", routed.block_m] = torch.cat(firsts)[back]
        self._expected["down", routed.block_m] = torch.cat(seconds)[back]

    def _expert(self, slot: int) -> list[torch.Tensor]:
        """One expert's three matrices in float32."""
        part = slice(slot, slot + 1)
        return [
            reference.widen(matrix[part], None if scale is None else scale[part])[0]
            for matrix, scale in zip(self._matrices[:3], self._matrices[3:], strict=True)
        ]


def _taken(rows: Rows, index: torch.Tensor) -> torch.Tensor:
    """Some of the rows, in float32."""
    values, is_fp8 = rows.values_NC, rows.values_NC.dtype == FP8  # which torch cannot index
    values = values.view(torch.uint8)[index].view(FP8) if is_fp8 else values[index]
    scale = None if rows.scale_NB is None else rows.scale_NB[index]
    return reference.dequantize(Rows(values, scale))

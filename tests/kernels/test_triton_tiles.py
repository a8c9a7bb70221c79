"""The rule that chooses tiles where no table does."""

from __future__ import annotations

import pytest

from expert_service.kernels.triton.tables.tiles import (
    Precision,
    choose_block_m,
    rule_tiles,
    rule_tiles_for,
)

PRECISIONS: list[Precision] = ["fp32", "fp16", "bf16", "w8a16", "w8a8"]


@pytest.mark.parametrize(
    ("assignments", "active_experts", "block_m"),
    [
        (0, 0, 16),
        (8, 8, 16),
        (64, 8, 16),  # 8 tokens for each expert
        (72, 8, 32),
        (128, 8, 32),
        (256, 8, 64),
        (512, 8, 128),
        (8192, 128, 128),
        (65536, 8, 128),
        (40, 1, 128),
    ],
)
def test_blocks_hold_twice_the_mean_load(
    assignments: int, active_experts: int, block_m: int
) -> None:
    assert choose_block_m(assignments, active_experts, "bf16") == block_m
    assert choose_block_m(assignments, active_experts, "w8a8") == min(block_m, 64)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize(("precision", "item_bytes"), [("bf16", 2), ("fp32", 4)])
def test_tiles_fit_the_shared_memory_of_an_h200(
    precision: Precision, item_bytes: int, block_m: int
) -> None:
    for tile, matrices in zip(rule_tiles(block_m, 7168, 2048, precision), (2, 1), strict=True):
        stage = (tile.block_m + matrices * tile.block_n) * tile.block_k * item_bytes
        assert tile.block_m == block_m
        assert tile.num_stages * stage <= 227 * 1024


def test_tiles_of_small_matrices_are_small() -> None:
    assert rule_tiles(16, 20, 5, "bf16").gate_up[:3] == (16, 16, 32)
    assert rule_tiles(128, 20, 5, "fp32").down[:3] == (128, 32, 32)


@pytest.mark.parametrize("precision", ["w8a16", "w8a8"])
def test_no_tile_sums_fewer_elements_than_fp8_products_take(precision: Precision) -> None:
    """32 at least, on a GPU; the interpreter does with any."""
    assert all(tile.block_k >= 32 for tile in rule_tiles(16, 1, 1, precision))


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("precision", ["w8a16", "w8a8"])
def test_tiles_of_fp8_weights_lie_within_one_block_of_scales(
    precision: Precision, block_m: int
) -> None:
    tiles = rule_tiles(block_m, 7168, 2048, precision)

    assert all(128 % tile.block_n == 0 == 128 % tile.block_k for tile in tiles)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_size_of_block_without_a_rule_is_refused(precision: Precision) -> None:
    with pytest.raises(ValueError, match="block_m is 8; expected one of"):
        rule_tiles(8, 7168, 2048, precision)


@pytest.mark.parametrize(
    ("num_pairs", "sizes", "gate_up_columns", "down_columns"),
    [
        (8, (8, 7168, 2048), 64, 128),  # 256 and 448 programs
        (1, (8, 7168, 2048), 32, 64),  # one expert: 64 and 112
        (2, (8, 4096, 14336), 64, 64),
        (65536, (8, 7168, 2048), 128, 256),
        (0, (8, 7168, 2048), 32, 64),
        (4, (2, 40, 24), 32, 32),  # nothing to divide
    ],
)
def test_few_pairs_get_narrow_tiles_so_that_no_multiprocessor_idles(
    num_pairs: int, sizes: tuple[int, int, int], gate_up_columns: int, down_columns: int
) -> None:
    tiles = rule_tiles_for(num_pairs, sizes, "bf16")

    assert (tiles.gate_up.block_n, tiles.down.block_n) == (gate_up_columns, down_columns)


def test_narrow_tiles_load_further_ahead() -> None:
    wide, narrow = (rule_tiles_for(pairs, (8, 7168, 2048), "bf16") for pairs in (8, 1))

    assert [tile.num_stages for tile in wide] == [4, 4]
    assert [tile.num_stages for tile in narrow] == [6, 6]


def test_w8a8_keeps_the_columns_that_share_a_scale_of_h() -> None:
    assert rule_tiles_for(1, (8, 7168, 2048), "w8a8").gate_up.block_n == 128

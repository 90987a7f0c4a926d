"""What every diffusion backbone must do; `test_backbones` runs it over the registry and over the docs' example."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.backbones.interface import Backbone, segments_between, single_blocks, sorted_prefix

BLOCK = 8


def randomised(backbone: Backbone) -> Backbone:
    """Every parameter random: zero-initialised gates would hide what the blocks do."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.15)
    return backbone.eval()


def rows(backbone: Backbone, n: int) -> tuple[Tensor, Tensor, list[int]]:
    """States, conditions and depths (non-increasing, from the least to the full) of n rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *backbone.row_shape, generator=generator)
    t, label = torch.rand(n, generator=generator), torch.arange(n) % (backbone.null_label + 1)
    least = max(1, backbone.always)
    depths = sorted((least + i % (backbone.depth - least + 1) for i in range(n)), reverse=True)
    return x, backbone.condition(t, label), depths


def attributes_describe_it(backbone: Backbone) -> None:
    assert 0 <= backbone.always < backbone.depth
    assert sorted(backbone.ranks) == list(range(backbone.always, backbone.depth))
    assert len(backbone.row_shape) == 3


def output_has_the_shape_of_the_state(backbone: Backbone) -> None:
    channels, *sides = backbone.row_shape
    x, condition, depths = rows(backbone, 3)
    output, _ = backbone(x, condition, depths)
    assert output.shape == (3, channels * (2 if backbone.learned_variance else 1), *sides)
    assert output.dtype == torch.float32


def mixed_depths_equal_each_row_alone(backbone: Backbone) -> None:
    x, condition, depths = rows(backbone, 11)
    mixed, _ = backbone(x, condition, depths)
    for i, depth in enumerate(depths):
        alone, _ = backbone(x[i : i + 1], condition[i : i + 1], [depth])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def every_depth_gives_another_output(backbone: Backbone) -> None:
    x, condition, depths = rows(backbone, 1)
    outputs = [backbone(x, condition, [d])[0] for d in range(max(1, backbone.always), depths[0] + 1)]
    for shallow, deep in pairwise(outputs):
        assert (shallow - deep).abs().max() > 1e-4


def ran_counts_the_rows_of_every_block(backbone: Backbone) -> None:
    x, condition, depths = rows(backbone, 11)
    called: dict[int, int] = {}
    original = backbone.block

    def counting(index: int, hidden: Tensor, *rest: object) -> Tensor:
        called[index] = called.get(index, 0) + len(hidden)
        return original(index, hidden, *rest)  # type: ignore[arg-type]

    backbone.block = counting  # type: ignore[method-assign]
    try:
        _, ran = backbone(x, condition, depths)
    finally:
        del backbone.block
    assert ran[: backbone.always] == [11] * backbone.always
    assert {i: n for i, n in enumerate(ran) if i >= backbone.always and n} == called
    assert sum(ran) == sum(depths)


def merged_segments_change_nothing(backbone: Backbone) -> None:
    x, condition, _ = rows(backbone, 6)
    least = max(1, backbone.always)
    depths = [backbone.depth] * 3 + [least] * 3
    merged = segments_between(backbone, depths)
    assert len(merged) <= 2 < len(single_blocks(backbone)) + 1
    expected, ran = sorted_prefix(backbone, single_blocks(backbone), x, condition, depths)
    output, ran_merged = sorted_prefix(backbone, merged, x, condition, depths)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert sum(ran) == sum(ran_merged) == sum(depths)


def conditions_in_fixed_blocks_are_bit_stable(backbone: Backbone) -> None:
    t, label = torch.rand(BLOCK), torch.arange(BLOCK) % (backbone.null_label + 1)
    together = backbone.condition(t, label)
    for i in range(BLOCK):
        repeated = backbone.condition(t[i].expand(BLOCK), label[i].expand(BLOCK))
        assert torch.equal(repeated[(i + 3) % BLOCK], together[i])


def exit_training_leaves_its_time_embedder(backbone: Backbone) -> None:
    frozen = backbone.frozen_in_exits()
    assert frozen
    assert set(frozen) <= set(backbone.modules())


def every_parameter_learns(backbone: Backbone) -> None:
    x, _, _ = rows(backbone, backbone.null_label + 1)
    condition = backbone.condition(torch.rand(len(x)), torch.arange(len(x)))
    backbone(x, condition, [backbone.depth] * len(x))[0].square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []
    backbone.zero_grad()


CONTRACT: tuple[Callable[[Backbone], None], ...] = (
    attributes_describe_it,
    output_has_the_shape_of_the_state,
    mixed_depths_equal_each_row_alone,
    every_depth_gives_another_output,
    ran_counts_the_rows_of_every_block,
    merged_segments_change_nothing,
    conditions_in_fixed_blocks_are_bit_stable,
    exit_training_leaves_its_time_embedder,
    every_parameter_learns,
)

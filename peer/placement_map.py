"""A plan drawn on the map of its links, as an SVG picture: near devices near each other, a colour for each stage.

The map is classical multidimensional scaling (Torgerson 1952) of what a pair costs between neighbouring stages.
Refuses to know how the plan was found.
"""

from __future__ import annotations

from colorsys import hls_to_rgb
from itertools import pairwise
from typing import Final

import numpy as np

from market.placement import Plan, Problem
from market.placement_cost import Floats

__all__ = ["drawn", "layout"]

_WIDE: Final = 760
_HIGH: Final = 560
_TOP: Final = 64
_MARGIN: Final = 24
_LEGEND: Final = 280
_ITERATIONS: Final = 200  # of the power method: the picture is settled long before
_LEGEND_ROWS: Final = 24


def layout(costs: Floats) -> Floats:
    """Places in the plane, (N, 2), whose distances are about the costs (N, N): the two widest axes. The same every
    time."""
    count = len(costs)
    squared = costs**2
    centred = -(squared - squared.mean(0) - squared.mean(1)[:, None] + squared.mean()) / 2
    angle = np.arange(count) * 2.399963  # the golden angle: two starting axes that no order of devices favours
    axes = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    shift = float(np.abs(centred).sum(axis=1).max())  # makes the largest eigenvalues those largest in size
    if shift == 0:
        return np.zeros((count, 2))
    for _ in range(_ITERATIONS):
        axes, _ = np.linalg.qr(centred @ axes + shift * axes if count > 2 else centred @ axes)
    width = np.sqrt(np.maximum((axes * (centred @ axes)).sum(axis=0), 0))
    places: Floats = axes * width
    return places


def drawn(plan: Plan, problem: Problem, *, title: str) -> str:
    """The picture: a dot for each device, lines to the middle of its stage, thin lines along the pipelines, the
    tightest link of each boundary with its seconds."""
    row_of = {int(device): row for row, device in enumerate(problem.ids)}
    table = np.array([[row_of[device] for device in stage] for stage in plan.assignment])
    places = _scaled(layout(problem.hop))
    colours = [_colour(stage / len(table)) for stage in range(len(table))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDE + _LEGEND}" height="{_HIGH + _TOP}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_MARGIN}" y="26" font-size="14">{title}</text>',
        f'<text x="{_MARGIN}" y="46">{plan.cost.total_s:.2f} s an iteration: groups {plan.cost.sync_s:.2f} s, '
        f"pipeline {plan.cost.pipeline_s:.2f} s. Near each other: cheap to send activations.</text>",
    ]
    parts += _pipelines(table, places)
    for stage, colour in zip(table, colours, strict=True):
        middle = places[stage].mean(axis=0)
        parts += [_line(places[device], middle, colour, 0.7, 0.5) for device in stage]
    parts += _tightest(table, places, problem)
    for stage, (devices, colour) in enumerate(zip(table, colours, strict=True)):
        for device in devices:
            x, y = places[device]
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
                f"<title>device {int(problem.ids[device])}, stage {stage}</title></circle>"
            )
    parts += _legend(table, colours, problem)
    return "\n".join([*parts, "</svg>\n"])


def _colour(hue: float) -> str:
    """In hexadecimal: not every program that draws SVG knows hsl()."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb(hue, 0.45, 0.65))


def _scaled(places: Floats) -> Floats:
    low, span = places.min(axis=0), np.ptp(places, axis=0)
    unit = (places - low) / np.where(span > 0, span, 1)
    room = np.array([_WIDE - 2 * _MARGIN, _HIGH - 2 * _MARGIN])
    scaled: Floats = unit * room + np.array([_MARGIN, _MARGIN + _TOP])
    return scaled


def _line(a: Floats, b: Floats, colour: str, width: float, opacity: float) -> str:
    return (
        f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="{colour}" '
        f'stroke-width="{width}" opacity="{opacity}"/>'
    )


def _pipelines(table: np.ndarray[tuple[int, int], np.dtype[np.int64]], places: Floats) -> list[str]:
    pairs = [pair for stage, following in pairwise(table) for pair in zip(stage, following, strict=True)]
    return [_line(places[a], places[b], "#999999", 0.5, 0.45) for a, b in pairs]


def _tightest(
    table: np.ndarray[tuple[int, int], np.dtype[np.int64]], places: Floats, problem: Problem
) -> list[str]:
    """The link that decides each boundary, with its seconds."""
    parts = []
    for stage, following in pairwise(table):
        worst = int(problem.hop[stage, following].argmax())
        a, b = stage[worst], following[worst]
        x, y = (places[a] + places[b]) / 2
        parts.append(_line(places[a], places[b], "#222222", 1.4, 0.9))
        parts.append(f'<text x="{x + 4:.1f}" y="{y - 4:.1f}" fill="#222222">{problem.hop[a, b]:.2f} s</text>')
    return parts


def _legend(
    table: np.ndarray[tuple[int, int], np.dtype[np.int64]], colours: list[str], problem: Problem
) -> list[str]:
    parts = []
    for row, (stage, colour) in enumerate(zip(table[:_LEGEND_ROWS], colours, strict=False)):
        y = _TOP + _MARGIN + 18 * row
        seconds = problem.sync[np.ix_(stage, stage)].sum(axis=1).max()
        parts.append(f'<circle cx="{_WIDE + 14}" cy="{y - 4}" r="5" fill="{colour}"/>')
        words = f"stage {row}: {len(stage)} devices, {seconds:.2f} s to agree"
        parts.append(f'<text x="{_WIDE + 26}" y="{y}">{words}</text>')
    if len(table) > _LEGEND_ROWS:
        y = _TOP + _MARGIN + 18 * _LEGEND_ROWS
        parts.append(f'<text x="{_WIDE + 26}" y="{y}">and {len(table) - _LEGEND_ROWS} more</text>')
    return parts

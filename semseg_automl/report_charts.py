"""Charts of the report as inline SVG: curves over training, reliability, intervals. Text is always escaped.

Colours come from the page's style sheet by class, so that the charts follow its light and its dark theme. What is
drawn is decided in `semseg_automl.report_page`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from semseg_automl.calibration import ReliabilityBin

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 40
TICKS = 5

Point = tuple[float, float]


class _Scale(NamedTuple):
    """From values to places: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten.

    >>> nice_ticks(0.0, 1.0), nice_ticks(3.0, 3.0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [3.0])
    """
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def curve_chart(points: Sequence[Point], *, title: str, x_title: str, marked: float | None = None) -> Markup:
    """Draw a curve with a dot for each point.

    Args:
        points: x and y, in order of x; points that are not finite are left out.
        title: what y is, read out by screen readers.
        x_title: what x is.
        marked: x of a point that stands out, for example the best one.

    Returns:
        An ``svg`` element; an empty string where no point is finite.
    """
    drawn = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not drawn:
        return Markup()
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    margin = 0.05 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    x_scale = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(min(ys) - margin, max(ys) + margin, HEIGHT - BOTTOM, TOP)
    whole = [tick for tick in nice_ticks(x_scale.low, x_scale.high) if tick == int(tick)]
    parts = [_axes(x_scale, y_scale, whole, nice_ticks(y_scale.low, y_scale.high), x_title)]
    places = [(x_scale(x), y_scale(y)) for x, y in drawn]
    parts.append(Markup('<polyline class="line" points="{}"/>').format(" ".join(f"{x},{y}" for x, y in places)))
    for (x, y), (left, top) in zip(drawn, places, strict=True):
        best = x == marked
        dot = Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{} {:g}: {:.6g}</title></circle>')
        parts.append(dot.format("dot best" if best else "dot", left, top, 5 if best else 2.5, x_title, x, y))
    first, last = drawn[0][1], drawn[-1][1]
    return _svg(parts, f"{title}, from {first:.4g} to {last:.4g}")


def reliability_chart(bins: Sequence[ReliabilityBin], *, x_title: str, y_title: str) -> Markup:
    """Draw how often predictions came true against the probability they claimed; the diagonal is honest.

    The columns below show how many of the pixels each bin holds.

    Args:
        bins: in order of confidence; those without pixels are left out.
        x_title: what the confidence is.
        y_title: what the accuracy is.

    Returns:
        An ``svg`` element; an empty string without a pixel.
    """
    filled = [each for each in bins if each.pixels and math.isfinite(each.accuracy)]
    if not filled:
        return Markup()
    x_scale, y_scale = _Scale(0, 1, LEFT, WIDTH - RIGHT), _Scale(0, 1, HEIGHT - BOTTOM, TOP)
    ticks = nice_ticks(0, 1)
    parts = [_axes(x_scale, y_scale, ticks, ticks, x_title)]
    most, total = max(each.pixels for each in filled), sum(each.pixels for each in filled)
    width = (WIDTH - LEFT - RIGHT) / (1.2 * max(len(bins), 5))
    for each in filled:
        height = round(0.3 * (HEIGHT - TOP - BOTTOM) * each.pixels / most, 1)
        bar = Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{:.1%} of pixels</title></rect>')
        left = round(x_scale(each.confidence) - width / 2, 1)
        parts.append(bar.format(left, HEIGHT - BOTTOM - height, round(width, 1), height, each.pixels / total))
    diagonal = '<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>'
    parts.append(Markup(diagonal).format(x_scale(0), y_scale(0), x_scale(1), y_scale(1)))
    places = [(x_scale(each.confidence), y_scale(each.accuracy)) for each in filled]
    parts.append(Markup('<polyline class="line" points="{}"/>').format(" ".join(f"{x},{y}" for x, y in places)))
    for each, (left, top) in zip(filled, places, strict=True):
        dot = Markup('<circle class="dot" cx="{}" cy="{}" r="3"><title>claimed {:.3f}, true {:.3f}</title></circle>')
        parts.append(dot.format(left, top, each.confidence, each.accuracy))
    return _svg(parts, f"{y_title} against {x_title} in {len(filled)} bins; equal on the diagonal")


def interval_chart(value: float, low: float, high: float) -> Markup:
    """Draw a value between 0 and 1 and its interval on a line; an empty string where they are elsewhere."""
    if not all(0 <= each <= 1 for each in (value, low, high)):  # NaN, too
        return Markup()
    scale = _Scale(0, 1, 3, 117)
    return Markup(
        '<svg class="interval" viewBox="0 0 120 12" width="120" height="12" aria-hidden="true">'
        '<line class="grid" x1="3" x2="117" y1="6" y2="6"/><line class="reach" x1="{}" x2="{}" y1="6" y2="6"/>'
        '<circle class="dot" cx="{}" cy="6" r="3.5"/></svg>'
    ).format(scale(low), scale(high), scale(value))


def _axes(x: _Scale, y: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_title: str) -> Markup:
    parts = []
    for tick in y_ticks:
        row = '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text x="{3}" y="{4}" class="end">{5:g}</text>'
        parts.append(Markup(row).format(LEFT, WIDTH - RIGHT, y(tick), LEFT - 6, y(tick) + 4, tick))
    for tick in x_ticks:
        column = Markup('<text x="{}" y="{}" class="middle">{:g}</text>')
        parts.append(column.format(x(tick), HEIGHT - BOTTOM + 16, tick))
    name = Markup('<text x="{}" y="{}" class="middle">{}</text>')
    parts.append(name.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title))
    return Markup("").join(parts)


def _svg(parts: Sequence[Markup], label: str) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return head + Markup("").join(parts) + Markup("</svg>")

"""The plots of a report, as inline SVG with text left as text.

matplotlib is imported by the first plot drawn, never by importing this module. The same rows give
the same bytes: ids are hashed from the content with a fixed salt, and no date is written.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Sequence[Mapping[str, Any]]

_SECONDS = "time/elapsed_s"
_AXES = {"step": "RL steps", _SECONDS: "seconds"}
_DIAGNOSTICS = {
    "ratio": "largest and smallest probability ratio new / old; 1 = unchanged",
    "kl_old_new": "KL(old ‖ new), nats",
    "kl_new_ref": "KL(new ‖ reference), nats",
    "entropy": "entropy of the sampling law, nats",
    "clip_fraction": "share of terms whose ratio is outside the clip bounds",
    "gradient_norm": "L2 norm of the gradient",
    "zero_variance_groups": "groups whose samples all earn the same",
}
_INK, _BLUE, _ORANGE, _GREY = "#1f2933", "#2b6cb0", "#c05621", "#9aa5b1"
_COLOURS = (_ORANGE, "#2f855a", "#6b46c1", "#b83280")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 3.5,
    "errorbar.capsize": 2.5,
}


@dataclass(frozen=True)
class Panel:
    """One plot with its caption."""

    title: str
    note: str
    svg: str


def finite(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def learning_panels(metrics: Rows, evaluations: Rows) -> list[Panel]:
    """The reward and every evaluated metric against steps, then against seconds.

    Args:
        metrics: rows of ``metrics.jsonl``, the training batches.
        evaluations: rows of ``evaluations.jsonl``; those of split ``validation`` are drawn with
            error bars of one standard error, a curve for each ``weights``. The base model, being
            step 0 of training, starts the curve of the trained weights.
    """
    seconds = {0: 0.0} | {row["step"]: row.get(_SECONDS) for row in metrics}
    validation = [
        {**row, _SECONDS: seconds.get(row["step"])}
        for row in evaluations
        if row["split"] == "validation"
    ]
    names = learning_names(evaluations)
    timed = any(finite(row.get(_SECONDS)) is not None for row in metrics)
    panels = [
        _learning_panel(name, axis, metrics, validation)
        for axis in _AXES
        if axis == "step" or timed
        for name in names
    ]
    return [panel for panel in panels if panel]


def learning_names(evaluations: Rows) -> list[str]:
    """What the learning curves show: every evaluated metric, and the reward."""
    return _unique([*(name for row in evaluations for name in row["metrics"]), "reward"])


def diagnostic_panels(metrics: Rows, evaluations: Rows) -> list[Panel]:
    """Everything logged that is neither a learning curve nor a clock, against steps.

    The extremes of the ratio share a panel.
    """
    elsewhere = {*learning_names(evaluations), "step", "samples", "ratio_min", "ratio_max"}
    logged = [name for row in metrics for name in row if not name.startswith("time/")]
    names = [name for name in _unique([*_DIAGNOSTICS, *logged]) if name not in elsewhere]
    panels = [_diagnostic_panel(name, metrics) for name in names]
    return [panel for panel in panels if panel]


def _learning_panel(name: str, axis: str, metrics: Rows, validation: Rows) -> Panel | None:
    x, y = _points(metrics, axis, name)
    window = max(1, len(x) // 20)
    label = f"training, mean of {window} steps" if window > 1 else "training"
    curves = [_Curve("", x, y, "#bcd3ea", width=0.8)] if window > 1 else []
    curves += [_Curve(label, x, running_mean(y, window), _BLUE)] if x else []
    by_weights = _by_weights(name, axis, validation)
    for (weights, points), colour in zip(by_weights.items(), itertools.cycle(_COLOURS)):
        x, y, se = map(list, zip(*points, strict=True))
        label = "validation" if weights == "trained" else f"validation, {weights}"
        curves.append(_Curve(label, x, y, colour, se=se))
    if not curves:
        return None
    note = _note(f"against {_AXES[axis]}", metrics, name)
    return Panel(name, note, _svg(f"{name} {axis}", _AXES[axis], curves))


def _by_weights(
    name: str, axis: str, validation: Rows
) -> dict[str, list[tuple[float, float, float]]]:
    """``weights`` to its points (x, mean, standard error; 0 where there is none)."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in validation:
        estimate = row["metrics"].get(name, {})
        x, mean = finite(row.get(axis)), finite(estimate.get("mean"))
        if x is not None and mean is not None:
            weights = "trained" if row["weights"] == "base" else row["weights"]
            points.setdefault(weights, []).append((x, mean, finite(estimate.get("se")) or 0.0))
    return points


def _diagnostic_panel(name: str, metrics: Rows) -> Panel | None:
    keys = ("ratio_max", "ratio_min") if name == "ratio" else (name,)
    curves = [
        _Curve(key, *_points(metrics, "step", key), colour)
        for key, colour in zip(keys, (_BLUE, _ORANGE), strict=False)
    ]
    if not any(curve.x for curve in curves):
        return None
    note = _note(_DIAGNOSTICS.get(name, ""), metrics, *keys)
    return Panel(name, note, _svg(name, _AXES["step"], curves))


def _note(text: str, metrics: Rows, *names: str) -> str:
    """``text``, and how many values cannot be drawn for being infinite or not a number."""
    values = [row.get(name) for row in metrics for name in names]
    lost = sum(isinstance(value, float) and not math.isfinite(value) for value in values)
    return "; ".join(filter(None, [text, f"non-finite values not drawn: {lost}" if lost else ""]))


@dataclass(frozen=True)
class _Curve:
    label: str
    """Named in the legend unless empty."""
    x: list[float]
    y: list[float]
    colour: str
    se: list[float] | None = None
    """Half-length of the error bars."""
    width: float = 1.6


def _svg(name: str, x_label: str, curves: Sequence[_Curve]) -> str:
    """The ``<svg>`` element alone, without metadata and without ids that nothing refers to."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label)
        for curve in curves:
            few = len(curve.x) < 20
            axes.errorbar(
                curve.x,
                curve.y,
                curve.se,
                color=curve.colour,
                label=curve.label,
                linewidth=curve.width,
                marker="o" if few or curve.se else "",
            )
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=2)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    return re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])


def _points(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    """The rows in which both columns hold a finite number."""
    pairs = [(finite(row.get(x)), finite(row.get(y))) for row in rows]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in kept], [b for _, b in kept]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the ``window - 1`` before it, or of as many as there are."""
    total = [0.0, *itertools.accumulate(values)]
    starts = [max(0, end - window) for end in range(1, len(total))]
    return [
        (total[end] - total[start]) / (end - start) for end, start in enumerate(starts, start=1)
    ]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def sheet(images: Float[Tensor, "n C H W"], *, columns: int = 8) -> bytes:
    """Images in [0, 1], one or three channels, side by side as a PNG; small ones are enlarged."""
    from matplotlib import image

    n, channels, height, width = images.shape
    scale = max(1, 64 // width)
    rows = math.ceil(n / columns)
    table = torch.ones((rows * columns, channels, height * scale + 2, width * scale + 2))
    large = images.detach().float().cpu().clamp(0, 1)
    large = large.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    table[:n, :, 1:-1, 1:-1] = large
    grid = table.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    data = io.BytesIO()
    image.imsave(data, grid.expand(-1, -1, 3).numpy(), format="png", metadata={"Software": ""})
    return data.getvalue()

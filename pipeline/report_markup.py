"""Markup that escapes by default, figures as text, and plots that stretch with their cell while their text does not."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.records import Estimate, TrainingResult

NONE = "–"  # an undefined figure
NAMES = {"fine_tuned": "fine-tuned", "model_set": "model set"}
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]")
SHAPES = {
    "model": '<circle class="dot" cx="{x}" cy="50%" r="4"/>',
    "given": '<circle class="dot open" cx="{x}" cy="50%" r="4"/>',
    "baseline": '<line class="bar" x1="{x}" x2="{x}" y1="30%" y2="70%"/>',
}


class Html(str):
    """Markup that is safe as it stands. `h` escapes every other value, so no text becomes markup unless code says `Html(...)`."""

    __slots__ = ()


def h(value: object) -> Html:
    """The value as markup: escaped, its writing direction kept to itself, controls and lone surrogates replaced."""
    if isinstance(value, Html):
        return value
    text = attribute(NONE if value is None else value)
    return Html(f"<bdi>{text}</bdi>" if RIGHT_TO_LEFT.search(text) else text)


def attribute(value: object) -> str:
    """The value as the inside of a quoted attribute or of a title."""
    return html.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("".join(h(part) for part in parts))


def note(text: object) -> Html:
    return Html(f'<p class="note">{h(text)}</p>')


def bullets(items: Iterable[object]) -> Html:
    lines = join(Html(f"<li>{h(item)}</li>") for item in items)
    return Html(f"<ul>{lines}</ul>") if lines else Html()


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    lines = join(Html(f"<div><dt>{h(name)}</dt><dd>{h(value)}</dd></div>") for name, value in pairs)
    return Html(f"<dl>{lines}</dl>") if lines else Html()


def details(title: str, body: Html) -> Html:
    return Html(f"<details><summary>{h(title)}</summary>{body}</details>") if body else Html()


def code(text: object) -> Html:
    return Html(f"<code>{h(text)}</code>")


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object] | Html], kind: str = "") -> Html:
    """A table that scrolls inside its box. A heading that starts with ">" is a column of figures; a row that is Html heads a group."""
    right = [' class="n"' if name.startswith(">") else "" for name in head]
    names = [name if isinstance(name, Html) else h(name.removeprefix(">")) for name in head]
    heads = "".join(f'<th scope="col"{n}>{name}</th>' for name, n in zip(names, right, strict=True))
    lines = []
    for row in rows:
        if isinstance(row, Html):
            lines.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(head)}">{row}</th></tr>')
            continue
        cells = "".join(f"<td{n}>{h(cell)}</td>" for cell, n in zip(row[1:], right[1:], strict=True))
        lines.append(f'<tr><th scope="row">{h(row[0])}</th>{cells}</tr>')
    caption = f"<caption><span>{h(title)}</span></caption>" if title else ""
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{attribute(title or head[0])}"><table class="{kind}">{caption}'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def number(estimate: Estimate | None, *, percent: bool = False, points: bool = False) -> str:
    """`72.3 % [68.6, 75.8]`, `0.612 [0.580, 0.640]`, or for a difference in points `+4.1 [−0.3, +8.5]`."""
    if estimate is None or estimate.value is None:
        return NONE
    scale, form = (100, "z.1f") if percent else (100, "+z.1f") if points else (1, "z.3f")
    figure = f"{estimate.value * scale:{form}}" + (" %" if percent else "")
    if estimate.low is not None and estimate.high is not None:
        figure += f" [{estimate.low * scale:{form}}, {estimate.high * scale:{form}}]"
    return figure.replace("-", "−")


def cell(estimate: Estimate | None, *, percent: bool = False, points: bool = False) -> Html:
    """The same with the interval set back."""
    figure, bracket, interval = number(estimate, percent=percent, points=points).partition(" [")
    return Html(f'{figure} <span class="ci">[{interval}</span>' if bracket else figure)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def points_text(value: float | None) -> str:
    return NONE if value is None else f"{value * 100:.1f}"


def count(amount: float) -> str:
    """A whole number with thin spaces between the thousands."""
    return f"{amount:,.0f}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def system_name(system: str) -> str:
    return NAMES.get(system, system)


# --- plots -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high` in steps; places are percentages of the width."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Iterable[float | None]) -> Axis:
        known = [value for value in values if value is not None] or [0.0, 1.0]
        span = max(known) - min(known)
        step = next(
            step for step in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0 ** math.ceil(math.log10(span + 1))) if span <= 5 * step
        )
        first = math.floor(min(known) / step + 1e-9)
        return cls(first * step, max(math.ceil(max(known) / step - 1e-9), first + 1) * step, step)

    @property
    def ticks(self) -> list[float]:
        return [self.low + n * self.step for n in range(round((self.high - self.low) / self.step) + 1)]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> str:
        return f"{6 + 88 * self.share(value):.2f}%"

    def heading(self, title: str) -> Html:
        """The scale, for the head of a column of `interval`s."""
        texts = "".join(f'<text x="{self.x(tick)}" y="11" text-anchor="middle">{tick * 100:z.0f}</text>' for tick in self.ticks)
        return Html(f'<span class="sr">{h(title)}</span><svg class="axis" aria-hidden="true">{texts.replace(">-", ">−")}</svg>')

    def interval(self, estimate: Estimate, shape: str, reference: float | None) -> Html:
        """One line of a forest plot; the figures stand beside it as text."""
        upright = '<line class="{}" x1="{}" x2="{}" y1="0" y2="100%"/>'
        lines = [upright.format("rule", self.x(tick), self.x(tick)) for tick in self.ticks]
        if reference is not None:
            lines.append(upright.format("reference", self.x(reference), self.x(reference)))
        if estimate.low is not None and estimate.high is not None:
            lines.append(f'<line class="bar" x1="{self.x(estimate.low)}" x2="{self.x(estimate.high)}" y1="50%" y2="50%"/>')
        if estimate.value is not None:
            lines.append(SHAPES[shape].format(x=self.x(estimate.value)))
        return Html(f'<svg class="plot" aria-hidden="true">{"".join(lines)}</svg>')


def learning_curve(training: TrainingResult) -> Html:
    """Both losses over the epochs; the lines differ in dash and mark, not in colour alone."""
    epochs = training.epochs
    axis = Axis.around(loss for e in epochs for loss in (e.train_loss, e.valid_loss))
    x = [f"{12 + 82 * (n / (len(epochs) - 1) if len(epochs) > 1 else 0.5):.2f}%" for n in range(len(epochs))]
    y = {value: f"{184 - 164 * axis.share(value):.1f}" for value in axis.ticks}
    parts = [
        f'<line class="rule" x1="10%" x2="100%" y1="{at}" y2="{at}"/><text x="8%" y="{at}" dy="4" text-anchor="end">{tick:.2f}</text>'
        for tick, at in y.items()
    ]
    for place, epoch in zip(x, epochs, strict=True):
        if epoch.epoch == training.best_epoch:
            parts.append(f'<line class="reference" x1="{place}" x2="{place}" y1="14" y2="184"/>')
            parts.append(f'<text x="{place}" y="10" text-anchor="middle">kept</text>')
        if epoch.epoch == training.best_epoch or (epoch.epoch - 1) % max(1, len(epochs) // 10) == 0:
            parts.append(f'<text x="{place}" y="202" text-anchor="middle">{epoch.epoch}</text>')
    for kind, shape, losses in (("train", "", [e.train_loss for e in epochs]), ("valid", " open", [e.valid_loss for e in epochs])):
        points = [(place, f"{184 - 164 * axis.share(loss):.1f}") for place, loss in zip(x, losses, strict=True) if loss is not None]
        for (x1, y1), (x2, y2) in pairwise(points):
            parts.append(f'<line class="bar {kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
        parts += [f'<circle class="dot{shape}" cx="{place}" cy="{at}" r="4"/>' for place, at in points]
    label = "Training and validation loss of each epoch; the table beside it holds the figures"
    key = "Loss an answer token, by epoch.  ●─ training  ○┄ validation"
    return Html(f'<figure><svg class="curve" role="img" aria-label="{label}">{"".join(parts)}</svg><figcaption>{key}</figcaption></figure>')

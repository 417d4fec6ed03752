"""Pictures for the Hub: the same bytes for the same card, whatever names are in it."""

from __future__ import annotations

import copy
import struct
from typing import Any

import matplotlib
import pytest

from pipeline.backends.plots import accuracy, confusion, draw, learning_curve
from tests.test_cards import cards

HOSTILE = ["$\\frac{1}{0}$", "a\nb\x00c", "‮evil", "日本語", "", "<b>|`x`", "x" * 300, "100 %"]


def chunks(png: bytes) -> list[bytes]:
    """The kinds of a PNG's chunks, in order."""
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append(png[at + 4 : at + 8])
        at += length + 12
    return found


def test_a_run_shows_accuracy_and_confusion_and_a_model_its_learning_curve() -> None:
    made = cards()
    assert list(draw(made["run"])) == ["accuracy.png", "confusion.png"]
    assert list(draw(made["model"])) == ["accuracy.png"]  # one epoch is no course
    made["model"]["pipeline"]["training"]["epochs"] *= 2
    assert list(draw(made["model"])) == ["accuracy.png", "learning_curve.png"]
    assert draw(made["dataset"]) == {}
    alt = draw(made["run"])["accuracy.png"].alt
    assert "fine-tuned 80.0 % (50.0 to 90.0)" in alt
    assert "3 rated Match by the expert were called Match" in draw(made["run"])["confusion.png"].alt


def test_the_same_card_gives_the_same_bytes_whatever_the_users_settings() -> None:
    made = cards()["run"]
    before = draw(made)
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 17, "axes.facecolor": "red"}):
        assert draw(made) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_pictures_are_wide_enough_and_hold_no_text_about_their_maker() -> None:
    for plot in draw(cards()["run"]).values():
        assert struct.unpack(">I", plot.png[16:20]) == (1600,)
        assert not {b"tEXt", b"iTXt", b"zTXt", b"tIME", b"eXIf"} & set(chunks(plot.png))


def test_names_may_hold_anything() -> None:
    estimates = {name: {"value": 0.5, "low": 0.25, "high": 0.75} for name in HOSTILE}
    assert accuracy(estimates, dict.fromkeys(HOSTILE, "given")).png[:4] == b"\x89PNG"
    counts = [[n] * (len(HOSTILE) + 1) for n in range(len(HOSTILE))]
    assert confusion(HOSTILE[0], HOSTILE, counts).png[:4] == b"\x89PNG"


def test_what_is_undefined_is_left_out() -> None:
    made = copy.deepcopy(cards()["run"])
    for scores in made["pipeline"]["systems"].values():
        scores["accuracy"] = {"value": None, "n": 0}
        scores["confusion"] = []
    assert draw(made) == {}
    assert "validation" not in learning_curve([{"epoch": 1, "train_loss": 1.0, "valid_loss": None}], None).alt


@pytest.mark.parametrize("epochs", [1, 40])
def test_few_and_many_epochs(epochs: int) -> None:
    course: list[dict[str, Any]] = [{"epoch": n, "train_loss": 1 / n, "valid_loss": 2 / n} for n in range(1, epochs + 1)]
    assert f"epoch {epochs} was kept" in learning_curve(course, epochs).alt

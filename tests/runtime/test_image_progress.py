"""Progress through images: what is said, how often, and a rate of this run alone."""

import pytest

from dinofast.runtime import image_progress
from dinofast.runtime.image_progress import ImageProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(image_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(image_progress, "is_terminal", lambda: False)
    return now


def test_a_line_now_and_then_and_the_last(clock, capsys):
    progress = ImageProgress(100, first=20)
    for done, seconds in ((30, 4), (40, 7), (60, 7), (100, 7)):
        clock[0] += seconds
        progress.show(done, 3)
    progress.end()
    assert capsys.readouterr().out.splitlines() == [
        "40 of 100 images, 2 images/s, ETA 0:00:33, 3 bad",  # 20 in 11 s
        "100 of 100 images, 3 images/s, ETA 0:00:00, 3 bad",
    ]
    assert progress.rate() == 80 / 25


def test_what_is_brief_says_nothing_of_what_is_done_at_once(clock, capsys):
    for brief, lines in ((True, 0), (False, 1)):
        progress = ImageProgress(5, brief=brief)
        clock[0] += 1
        progress.show(5)
        said = capsys.readouterr().out
        assert said.count("\n") == lines and "bad" not in said
    progress = ImageProgress(5, brief=True)
    for done in (2, 5):
        clock[0] += 20
        progress.show(done)
    assert capsys.readouterr().out.count("\n") == 2


def test_nothing_done_yet_has_no_end(clock, capsys):
    progress = ImageProgress(5)
    clock[0] += 20
    progress.show(0, 0)
    assert capsys.readouterr().out == "0 of 5 images, 0 images/s, ETA unknown, 0 bad\n"

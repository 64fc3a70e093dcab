"""What every test shares: one thread, as in the published numbers; and where tests save time."""

import gc

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # while tests are collected, which is mostly importing


def pytest_collection_finish() -> None:
    """What is imported by now stays, so no collection of garbage needs to look at it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def undrawn():
    """Reports with empty plots, for tests of other things: drawing takes longer than training.

    Whole reports are those of ``evaluation/test_report.py``, ``training/test_processes.py`` and
    ``test_examples.py``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rescore.evaluation.plots._svg", lambda *_: "<svg/>")
        yield

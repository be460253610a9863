"""A finished study that never was, and its page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flexolmo.files import write_bytes
from flexolmo.research.study.study_page import write_page
from made_results import make_results


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """Three seeds with ablations: results, directory, page."""
    results, out = make_results(3, has_ablations=True), tmp_path_factory.mktemp("study")
    return results, out, write_page(results, out).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def make_root(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make_root(name)`: a directory for a study. All have their steps in one place, where what
    several need is done once."""
    steps = tmp_path_factory.mktemp("steps")

    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        (root / "steps").symlink_to(steps)
        return root

    return make


@pytest.fixture(scope="module")
def few_tried() -> Iterator[None]:
    """Of all numbers that a study chooses from on validation text, as few as make a choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.research.study.recipe.SOUP_PROMPTS", (8, 64))
        patch.setattr("flexolmo.research.study.recipe.SOUP_TEMPERATURES", (1.0, 32.0))
        patch.setattr("flexolmo.research.study.measure_steps.TEMPERATURES", (1.0, 16.0, 256.0))
        yield


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at no picture: each is drawn once, for a file that stays empty."""

    def sketch(fig: Figure, path: Path) -> None:
        fig.draw_without_rendering()
        write_bytes(path, b"")

    monkeypatch.setattr("flexolmo.report.page.save_figure", sketch)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read the page only; drawing takes seconds."""
    monkeypatch.setattr("flexolmo.research.study.study_page._FIGURES", ())

"""Parts of an explorer in a browser, and the weights as a page keeps them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import browser as browsers

from interp import plots
from interp.analyses.views.explore import Explored
from interp.plots.explorer import N_STEPS

N, BLOCK, LENGTH = 300, 8, 38
"""tokens, tokens of a block, and blocks"""
LEFT, TOP = 48, 6
"""pixels of the axes of a map"""


def rounded(explored: Explored) -> Explored:
    """The prompt with weights in the steps that a page keeps."""
    maps, probs = (((part.sqrt() * N_STEPS).round() / N_STEPS).square() for part in (explored.maps, explored.probs))
    return replace(explored, maps=maps.tril(), probs=probs)


def ready(watched: browsers.Watched, where: str = ".explorer") -> None:
    watched.page.locator(f"{where}[data-drawn]").wait_for()


def part(watched: browsers.Watched, name: str) -> Any:
    return watched.page.locator(f'[data-part="{name}"]')


def point(watched: browsers.Watched, i: int, j: int) -> dict[str, float]:
    """The place of the block (i, j) on the whole map."""
    side = part(watched, "map").bounding_box()["height"] - 36
    return {"x": LEFT + (j + 0.5) / LENGTH * side, "y": TOP + (i + 0.5) / LENGTH * side}


def block_range(i: int) -> str:
    return f"{i * BLOCK}–{min(N, (i + 1) * BLOCK) - 1}"


def reading(explored: Explored, head: str, i: int, j: int, marks: str = "") -> str:
    mean = plots.number(float(explored.map(head)[i, j]))
    where = f"queries {block_range(i)} on keys {block_range(j)}{marks and f' ({marks})'}"
    return f"{where}: on average {mean} of a query's attention"


def saved(watched: browsers.Watched, name: str) -> tuple[str, str]:
    with watched.page.expect_download() as waiting:
        part(watched, name).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_text("utf-8")

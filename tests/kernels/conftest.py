"""Fixtures and settings for the tests of the kernels.

On a GPU these tests run alone (`make gpu-test`), without tests/conftest.py and the packages that it needs.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# set before the import of triton, which reads it only once
os.environ.setdefault("TRITON_INTERPRET", "1")
# torch requires this for deterministic results
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
sys.path.insert(0, str(Path(__file__).parent))

from importlib.util import find_spec

import pytest
import torch

from interp.kernels.gpu import tile_sizes

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
TINY_TILINGS = {"16x16": (16, 16, 4, 1), "16x32": (16, 32, 4, 1)}


# these files need triton
collect_ignore_glob = [] if find_spec("triton") else ["test_triton*.py", "test_compile.py", "test_gpu.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs more than a few seconds")
    config.addinivalue_line("markers", "interpreter: kernels run in Triton's interpreter, on a CPU")
    # numpy warns about infinities, which GPUs accept silently
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:invalid value encountered:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run: the GPU, or the CPU if they are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that elements which a kernel does not write are detected."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=["16x16", pytest.param("16x32", marks=pytest.mark.slow)])
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Set the tilings of all kinds so small that a short call has several tiles, and return rows and keys of a tile."""
    yield from set_tilings(monkeypatch, TINY_TILINGS[request.param])


@pytest.fixture
def tiny16(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Set the tilings of all kinds to 16 x 16."""
    yield from set_tilings(monkeypatch, TINY_TILINGS["16x16"])


def set_tilings(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    for kind in tile_sizes.TILINGS_FLOAT32:
        monkeypatch.setitem(tile_sizes.TILINGS_FLOAT32, kind, dict.fromkeys((64, 128, 256), tile))
    tile_sizes.lookup_tiling.cache_clear()
    yield tile[:2]
    monkeypatch.undo()
    tile_sizes.lookup_tiling.cache_clear()

"""What the tests of kernels share.

On a GPU they run alone (`make gpu-test`), without tests/conftest.py and the packages that it needs.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# before triton is imported, which reads it once
os.environ.setdefault("TRITON_INTERPRET", "1")
# as torch asks of whoever wants the same result twice
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
sys.path.insert(0, str(Path(__file__).parent))

from importlib.util import find_spec

import pytest
import torch

from interp.kernels.gpu import tile_sizes as settings

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
TINY = {"16x16": (16, 16, 4, 1), "16x32": (16, 32, 4, 1)}


# without triton there is nothing to run them with
collect_ignore_glob = [] if find_spec("triton") else ["test_triton*.py", "test_compile.py", "test_gpu.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs more than a few seconds")
    config.addinivalue_line("markers", "interpreter: kernels run in Triton's interpreter, on a CPU")
    # numpy speaks of infinities that GPUs take in silence
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:invalid value encountered:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, unless they are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds nan: what a kernel leaves out is seen."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=["16x16", pytest.param("16x32", marks=pytest.mark.slow)])
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Rows and keys of tiles so small that a short call has several of them, in the table for every kind."""
    yield from tabled(monkeypatch, TINY[request.param])


@pytest.fixture
def tiny16(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    yield from tabled(monkeypatch, TINY["16x16"])


def tabled(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    for kind in settings.SINGLE:
        monkeypatch.setitem(settings.SINGLE, kind, dict.fromkeys((64, 128, 256), tile))
    settings.table.cache_clear()
    yield tile[:2]
    monkeypatch.undo()
    settings.table.cache_clear()

"""The part of the quick tests that `make test` traces for its coverage figure.

Python 3.11 runs every line of every package at about half its speed while it is traced.
All tests of a file that needs a few seconds are traced; in a longer one, each test function with its first parameters.
Kernels in Triton's interpreter are not traced.
"""

import pytest
from fast_tests import UNKNOWN_SECONDS, read_durations

FULLY_TRACED_SECONDS = 5.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests during which pytest-cov pauses."""
    if not config.getoption("cov_source", None):
        return
    durations = read_durations()
    seen = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        is_long = durations.get(item.path, UNKNOWN_SECONDS) > FULLY_TRACED_SECONDS
        if (is_long and function in seen) or item.get_closest_marker("interpreter"):
            item.add_marker("no_cover")
        seen.add(function)

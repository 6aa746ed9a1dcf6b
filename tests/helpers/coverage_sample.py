"""What `make test` traces for its coverage figure: each test function with its first parameters."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let pytest-cov pause in the further parameters of a test, which run the same lines, and in Triton's interpreter.

    Python 3.11 runs every line of every package several times slower while it is traced.
    """
    if not config.getoption("cov_source", None):
        return
    seen = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in seen or item.get_closest_marker("interpreter"):
            item.add_marker("no_cover")
        seen.add(function)

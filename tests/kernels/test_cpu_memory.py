"""The memory of a reading on a CPU grows with the length, not with its square."""

import pytest

from benchmarks.cpu_memory import HEADS, SIZE, measured

SHORT, LONG = 8_000, 64_000


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mass", "top_keys", "blocks"])
def test_memory_is_linear_in_the_length(reduction):
    short, long = measured(reduction, SHORT), measured(reduction, LONG)
    # copies of q, k and v, and what the results take
    linear = 4 * (LONG - SHORT) * (HEADS + 2) * SIZE * 4
    assert long["extra"] - short["extra"] < linear + 2 * (long["results"] - short["results"]) + 24e6

"""The list of planted bugs fits the code: each replaces one text of its file and names tests that exist."""

from dataclasses import replace

import pytest
from mutants import MUTANTS, ROOT, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_changes_its_file_and_names_tests(mutant):
    text = (ROOT / mutant.file).read_text()
    changed = planted(mutant, text)
    assert changed != text
    compile(changed, mutant.file, "exec")
    paths = [argument for argument in mutant.tests if argument.startswith("tests/")]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def test_a_text_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="occurs 0 times"):
        planted(replace(MUTANTS[0], before="no such text"), "a file")


def test_names_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)

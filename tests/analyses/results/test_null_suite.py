"""Every verdict that the project prints, in null experiments and with a planted effect."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import null_experiments
import pytest
from null_experiments import VERDICTS
from scipy.stats import binom

import interp

N_PROMPTS = (4, 8, 16, 50)
LEVEL, ALLOWED = 0.05, 0.06
N_POWER = 50
"""experiments with a planted effect"""
PRINTED = {
    "report/trials_words.py": "ablation, influence, steering, pruning, curve, selector, selectors and shares",
    "report/trials_tables.py": "pruning: every share, curve, selectors: loss",
    "report/sections/trials.html.j2": "pruning: every share, curve, selectors: loss",
    "report/sections/refusals.py": "safety",
    "analyses/measures/refusals.py": "safety: the model refuses",
    "analyses/results/trials.py": "ablation",
    "analyses/results/comparison.py": "overlap of two tables",
    "report/extra_columns.py": "computed control",
    "plots/heads.py": "overlap of two tables, role: shares",
    "plots/rankings.py": "overlap of two tables",
    "report/report.html.j2": "overlap of two tables",
    "report/words.py": "best head, role: counts",
    "report/sections/head_roles.html.j2": "role: counts",
    "report/sections/head_scores_digest.html.j2": "role: counts",
    "report/roles.py": "role: counts",
    "plots/atlas.py": "role: counts",
    "analyses/views/head_roles.py": "role: counts",
    "analyses/results/head_scores_text.py": "role: counts",
    "analyses/results/head_scores.py": "role: counts",
}
"""file below interp/ that words a verdict -> rows of the table above"""
COMMENT = ("#", '"""')
WORDS = re.compile(
    r"""["'>].*(?:[Bb]eyond (?:\{|random)|\} than \{|differ from random|'excludes'|istinguishable|(?<![.])\b[Cc]onf"""
    r"""ident|lower the refusal|'is above'|\bp = \{)|p_overlap|p_text\(|fisher_exact\("""
)


def findings(*asked: tuple[str, int, int, int, int]) -> list[list[int]]:
    """Numbers of findings without and with an effect, see `null_experiments`."""
    command = [sys.executable, null_experiments.__file__, json.dumps(asked)]
    environment = os.environ | {"PYTHONPATH": str(Path(interp.__file__).parents[1])}
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not made.returncode, made.stderr
    return json.loads(made.stdout.splitlines()[-1])


def test_few_experiments_find_nothing_where_nothing_is():
    asked = [(verdict.name, n, verdict.trials // 200, 0, 0) for verdict in VERDICTS for n in N_PROMPTS]
    found = iter(findings(*asked))
    for verdict in VERDICTS:
        positive = sum(next(found)[0] for _ in N_PROMPTS)
        trials = len(N_PROMPTS) * (verdict.trials // 200)
        assert positive <= binom.ppf(0.999, trials, LEVEL), f"{verdict.name}: {positive} of {trials}"


@pytest.mark.slow
@pytest.mark.parametrize("verdict", VERDICTS, ids=lambda each: each.name)
def test_false_positives_are_at_most_six_percent(verdict):
    trials = {n: verdict.n_trials(n) for n in N_PROMPTS}
    rows = findings(*((verdict.name, n, trials[n], N_POWER, 0) for n in N_PROMPTS))
    for n, (wrong, right) in zip(N_PROMPTS, rows, strict=True):
        if wrong > ALLOWED * trials[n]:
            # of 1,000 tests with a true 5 %, more than 6 % are positive in 7 of 100 cases; of 4,000, in 2 of 1,000
            wrong += findings((verdict.name, n, 3 * trials[n], 0, 1))[0][0]
            trials[n] *= 4
        power = right / N_POWER
        found = f"{verdict.name}, n={n}: false positives {wrong / trials[n]:.1%} of {trials[n]}, power {power:.0%}"
        print(found)
        assert wrong <= ALLOWED * trials[n], found
        assert n < 50 or power >= verdict.power, found


def test_every_file_that_words_a_verdict_is_listed():
    folder = Path(interp.__file__).parent
    files = [path for ending in ("py", "j2") for path in folder.rglob(f"*.{ending}")]
    found = {
        path.relative_to(folder).as_posix()
        for path in files
        if any(WORDS.search(line) for line in path.read_text().splitlines() if not line.lstrip().startswith(COMMENT))
    }
    assert found == set(PRINTED)
    names = {verdict.name for verdict in VERDICTS}
    assert {name for rows in PRINTED.values() for name in rows.split(", ")} <= names

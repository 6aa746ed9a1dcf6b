"""Experiments with a known answer for every verdict: results in which nothing is there, and results with an effect.

`python null_experiments.py '[[NAME, N_PROMPTS, NULLS, EFFECTS, SEED], ...]'` prints the numbers of findings. The tests
run it in a process of its own, in which types are not checked at every call.

Heads have effects of their own, which differ between layers and heads and have a long tail, and each prompt reacts
differently. In a null experiment the tested heads are random ones, so their scores have nothing to do with the effects.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from interp import steer
from interp.analyses import pruning
from interp.analyses.causal.random_sets import Condition, RandomSets, mean
from interp.analyses.measures.refusals import RefusalResult, Replies, check_contrast
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import MIN_COUNTED_PROMPTS
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.views.head_roles import head_roles
from interp.errors import UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.report.extra_columns import extra_columns
from interp.report.sections.refusals import refusal_words
from interp.report.trials_tables import pivot
from interp.report.trials_words import trials_words
from interp.report.words import summary

Draw = Callable[[np.random.Generator, int, bool], bool]
"""random numbers, number of prompts, whether an effect is planted -> whether the project calls a finding"""
LAYOUT = HeadLayout(6, 12, 4)
N_SETS, N_HEADS = 39, 4
"""random sets of a run, and heads of a set"""
N_CURVE_SETS = 99
"""random sets of a curve with several rankings"""
BEYOND_SETS = re.compile(
    r".+ ha(s|ve) a (larger effect|smaller effect|higher .+) than (all \d+|\d+ of \d+) random sets.* \(p = [\d.e-]+\): "
)
CORRECTED = re.compile(r"Larger effect than random sets .*correction for \d+ tests: ")
"""sentences that state a finding about a single head set, and about several of them"""
NAMES, SIZES = ("ships", "sahara", "gradient"), (1, 3, 5)


@dataclass(frozen=True)
class Verdict:
    """A verdict that the project prints."""

    name: str
    unit: str
    """what was drawn at random"""
    words: str
    """how it begins, or where it is"""
    draw: Draw
    power: float = 0.8
    """least share of findings with 50 prompts where an effect is planted"""
    trials: int = 1000
    """null experiments for each number of prompts"""
    is_share: bool = False
    """whether it is about a share of prompts, and so there is none below 10 prompts"""

    def n_trials(self, n: int) -> int:
        """Number of null experiments with n prompts; a hundred show that there is no verdict at all."""
        return 100 if self.is_share and n < MIN_COUNTED_PROMPTS else self.trials


class World:
    """A model of which only the effects of its heads are known."""

    def __init__(self, random: np.random.Generator, n: int) -> None:
        self.random, self.n = random, n
        layers = np.exp(random.normal(0, 0.5, (LAYOUT.layers, 1)))
        heads = layers * np.exp(random.normal(0, 1.0, (LAYOUT.layers, LAYOUT.heads)))
        self.effects = heads.reshape(-1) * np.exp(random.normal(0, 0.5, (n, LAYOUT.size)))
        self.base = random.normal(0, 1.0, n)

    def order(self, k: int, planted: bool, effect: float = 10.0) -> list[Head]:
        """A ranking of k heads in half of the layers; where it is planted, their effects are above the others'."""
        layers = self.random.choice(LAYOUT.layers, LAYOUT.layers // 2, replace=False)
        places = (layers[:, None] * LAYOUT.heads + np.arange(LAYOUT.heads)).reshape(-1)
        chosen = self.random.permutation(places)[:k]
        if planted:
            self.effects[:, chosen] += effect
        return [Head(*divmod(int(place), LAYOUT.heads)) for place in chosen]

    def loss(self, heads: HeadSet) -> tuple[float, ...]:
        """The loss of each prompt without some heads."""
        return tuple((3.0 + 0.1 * self.base + self._lost(heads)).tolist())

    def right(self, heads: HeadSet, sign: int = -1) -> tuple[float, ...]:
        """Whether each prompt is right without some heads, or with them steered."""
        margin = -sign * 24.0 + 6.0 * self.base + sign * self._lost(heads)
        return tuple((margin > 0).astype(float).tolist())

    def _lost(self, heads: HeadSet) -> np.ndarray:
        return self.effects[:, [head.layer * LAYOUT.heads + head.head for head in heads]].sum(1)


def curve_of(
    values: Callable[[HeadSet], dict[str, tuple[float, ...]]],
    orders: dict[str, list[Head]],
    sizes,
    seed: int,
    until: float = -1.0,
    n_sets: int = N_SETS,
    **about,
) -> Trials:
    """The trials of a causal curve, with random sets as the project draws them."""

    def trial(condition: Condition) -> Trial:
        return Trial(condition.name, values(condition.heads), condition.heads, len(condition.heads), condition.draw)

    base = trial(Condition(BASELINE, HeadSet(())))
    own: list[Trial] = []
    for name, order in orders.items():
        for size in sizes:
            own.append(trial(Condition(name, HeadSet(tuple(order[:size])))))
            if mean(own[-1]) <= until * mean(base):
                break
    sets = []
    for each in own:
        # a curve of several sets draws on after 39 of them, as causal_curve does
        drawn = RandomSets(each.heads, LAYOUT, n_sets, seed, each.condition, is_single=len(own) == 1)
        sets += drawn.run(trial, base, each)
    return Trials(
        "made",
        (base, *own, *sets),
        "zero",
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        n_random_sets=N_SETS,
        **about,
    )


def is_told(trials: Trials, finding: re.Pattern[str]) -> bool:
    """Whether the sentences of a report tell a finding."""
    return any(finding.match(sentence) for sentence in trials_words(trials))


def ablation(random: np.random.Generator, n: int, planted: bool) -> bool:
    world = World(random, n)
    orders = {"top": world.order(N_HEADS, planted)}
    trials = curve_of(lambda heads: {"accuracy": world.right(heads)}, orders, (N_HEADS,), int(random.integers(1 << 30)),
                    shares=("accuracy",))  # fmt: skip
    return is_told(trials, BEYOND_SETS)


def influence(random: np.random.Generator, n: int, planted: bool) -> bool:
    world = World(random, n)
    base = np.array(world.loss(HeadSet(())))
    trials = curve_of(
        lambda heads: {"influence": tuple((np.array(world.loss(heads)) / base - 1).tolist())},
        {"heads": world.order(N_HEADS, planted)}, (N_HEADS,), int(random.integers(1 << 30)), shares=("influence",),
    )  # fmt: skip
    return is_told(trials, BEYOND_SETS)


def curve(random: np.random.Generator, n: int, planted: bool) -> bool:
    world, seed = World(random, n), int(random.integers(1 << 30))
    orders = {name: world.order(max(SIZES), planted and name != "sahara") for name in NAMES}
    trials = curve_of(lambda heads: {"loss": world.loss(heads)}, orders, SIZES, seed, n_sets=N_CURVE_SETS)
    told = is_told(trials, CORRECTED)
    assert is_bold(trials, "loss") == told
    return told


def is_bold(trials: Trials, measure: str) -> bool:
    return any(cell and cell["apart"] for _, row in pivot(trials, measure)["rows"] for cell in row)


def safety(random: np.random.Generator, n: int, planted: bool) -> bool:
    world = World(random, n)
    orders = {name: world.order(max(SIZES), planted and name == "ships", effect=5.0) for name in NAMES}
    if planted:
        # two methods find the same heads
        orders["gradient"] = orders["ships"][::-1]
    found = curve_of(
        lambda heads: {"refused": world.right(heads), "easy right": (1.0,) * n}, orders, SIZES,
        int(random.integers(1 << 30)), until=0.5, n_sets=N_CURVE_SETS, shares=("refused", "easy right"),
    )  # fmt: skip
    return any(
        "lower the refusal rate" in sentence for sentence in refusal_words(RefusalResult({}, {}, {"zero": found}))
    )


def _pruned(random: np.random.Generator, n: int, planted: bool) -> Trials:
    world, shares = World(random, n), (0.0, 0.1, 0.3)
    seed, counts = int(random.integers(1 << 30)), [round(share * LAYOUT.size) for share in shares]
    table = torch.from_numpy(world.effects).float().view(n, LAYOUT.layers, LAYOUT.heads)
    scores = HeadScores("made", table if planted else torch.from_numpy(random.normal(size=table.shape)).float())
    orders = [pruning.order_of(scores, seed), *pruning.random_orders(LAYOUT, N_SETS, seed)]
    return Trials(
        "made",
        tuple(
            Trial("made" if not draw else RANDOM, {"loss": world.loss(HeadSet(tuple(order[:count])))},
                  HeadSet(tuple(order[:count])), share, max(0, draw - 1))
            for draw, order in enumerate(orders) for share, count in zip(shares, counts, strict=True)
        ),
        size_name="share of heads", claim="smaller effect",
    )  # fmt: skip


def pruned(random: np.random.Generator, n: int, planted: bool) -> bool:
    return is_told(_pruned(random, n, planted), BEYOND_SETS)


def bold_of_pruning(random: np.random.Generator, n: int, planted: bool) -> bool:
    return is_bold(_pruned(random, n, planted), "loss")


def steering(random: np.random.Generator, n: int, planted: bool) -> bool:
    world = World(random, n)
    edit = steer.Boost("mark", 2.0, heads=str(HeadSet(tuple(world.order(N_HEADS, planted)))))
    made = steer.steering_conditions(edit, LAYOUT, N_SETS, int(random.integers(1 << 30)))
    trials = [
        Trial(each.name, {"accuracy": world.right(each.heads, sign=1)}, each.heads,
              len(each.heads) if each.name != BASELINE else 0, each.draw)
        for each in made
    ]  # fmt: skip
    found = Trials("steering", tuple(trials), "Boost", shares=("accuracy",), claim="higher")
    return is_told(found, BEYOND_SETS)


def _selected(random: np.random.Generator, n: int, planted: bool, names: tuple[str, ...], ratios) -> Trials:
    """Key selectors on two tasks; random keys are drawn anew for every prompt, and so are those of a null selector."""
    trials = []
    for task in ("needle", "facts"):
        known = random.beta(2, 2, n)
        for ratio in ratios:
            for name in (RANDOM, *names):
                chance = known + 0.5 if planted and name == names[0] else known
                right = random.binomial(4, np.clip(chance, 0, 1)) / 4
                loss = 4 * (1 - chance) + random.gamma(2.0, 0.5, n)
                values = {"right": tuple(right.tolist()), "loss": tuple(loss.tolist())}
                trials.append(Trial(name, values, size=ratio, task=task))
    return Trials("kv", tuple(trials), size_name="share of keys", shares=("right",))


def selector(random: np.random.Generator, n: int, planted: bool) -> bool:
    return any("excludes 0" in each for each in trials_words(_selected(random, n, planted, ("snapkv",), (0.2,))))


SELECTORS, RATIOS = ("snapkv", "task_kv", "duo", "head_kv", "razor"), (0.1, 0.4)


def selectors(random: np.random.Generator, n: int, planted: bool) -> bool:
    words = trials_words(_selected(random, n, planted, SELECTORS, RATIOS))
    told = [each for each in words if each.startswith(("Furthest above", "Below"))]
    return any("points" in each or each.startswith("Below") for each in told)


def bold_of_selectors(random: np.random.Generator, n: int, planted: bool) -> bool:
    return is_bold(_selected(random, n, planted, SELECTORS, RATIOS), "loss")


def overlap(random: np.random.Generator, n: int, planted: bool) -> bool:
    """Two tables whose heads are in the same layers."""
    layers = random.normal(0, 1, (LAYOUT.layers, 1))
    shared = random.normal(0, 1, (LAYOUT.layers, LAYOUT.heads)) * planted
    one, other = (
        HeadScores(name, torch.from_numpy(layers + shared + random.normal(0, 0.3, (LAYOUT.layers, LAYOUT.heads))
                                          * (1 if planted else 3) + random.normal(0, 1, (n, *shared.shape))).float())
        for name in ("one", "other")
    )  # fmt: skip
    return one.compare(other, 10).p_overlap <= 0.05


def _table(kind: str) -> Callable[[np.random.Generator, int, bool], HeadScores]:
    """A table in which the true score of every head is the cut, or that of some heads is far above it."""
    cut = 0.3

    def made(random: np.random.Generator, n: int, planted: bool) -> HeadScores:
        shape, means = (n, LAYOUT.layers, LAYOUT.heads), np.full((LAYOUT.layers, LAYOUT.heads), cut)
        means[0, :3] += 0.6 * planted
        values = {
            "counts": lambda: random.binomial(1, means, shape),
            "shares": lambda: random.beta(8 * means, 8 * (1 - means), shape),
            "numbers": lambda: means + random.normal(0, 0.3, shape),
        }[kind]()
        return HeadScores("made", torch.from_numpy(values).float(), threshold=cut)

    return made


def roles(kind: str) -> Draw:
    made = _table(kind)
    return lambda random, n, planted: bool(head_roles({"made": made(random, n, planted)}).confident.any())


def best_head(random: np.random.Generator, n: int, planted: bool) -> bool:
    values = random.beta(2, 4, (n, LAYOUT.layers, LAYOUT.heads))
    values[:, 0, 0] = values[:, 0, 0] / 5 + 0.75 * planted
    return (
        "is above that of the next head"
        in summary(HeadScores("made", torch.from_numpy(values).float()), None).certainty
    )


def computed_control(random: np.random.Generator, n: int, planted: bool) -> bool:
    """A table and its computed control, whose true scores are equal, or that of some heads is far higher."""
    shape, more = (n, LAYOUT.layers, LAYOUT.heads), np.zeros((LAYOUT.layers, LAYOUT.heads))
    more[0, :3] = 0.6 * planted
    values, control = (torch.from_numpy(random.beta(2, 6, shape) + plus).float() for plus in (more, 0.0))
    scores = HeadScores("retrieval_reasoning", values, extras={"distractor": control})
    (column,) = extra_columns("retrieval_reasoning", scores, scores.top(10))
    return bool(column.n_higher)


def refusing(random: np.random.Generator, n: int, planted: bool) -> bool:
    asked = Prompts.from_ids([[1]] * n, pad_id=0)
    harmful, harmless = (
        Replies(asked, ("",) * n, tuple(bool(x) for x in random.random(n) < rate))
        for rate in ((0.95, 0.05) if planted else (0.5, 0.5))
    )
    try:
        check_contrast(harmful, harmless)
    except UsageError:
        return False
    return True


SET, PROMPT, HEAD = "head set", "prompt", "head within its layer"
VERDICTS = (
    Verdict("ablation", SET, "larger effect than k of n random sets", ablation, is_share=True),
    Verdict("influence", SET, "larger effect than k of n random sets", influence, is_share=True),
    Verdict("steering", SET, "higher than k of n random sets", steering, trials=500, is_share=True),
    Verdict("pruning", "order of heads", "smaller effect than k of n random sets", pruned),
    Verdict("pruning: every share", "order of heads", "bold cells", bold_of_pruning, trials=500),
    Verdict("curve", SET, "larger effect than random sets after a correction", curve, trials=200),
    Verdict("safety", SET, "lower the refusal rate", safety, power=0.5, trials=200, is_share=True),
    Verdict("safety: the model refuses", PROMPT, "the run does not stop", refusing),
    Verdict("selector", PROMPT, "the interval excludes 0", selector, is_share=True),
    Verdict("selectors and shares", PROMPT, "Furthest above random, Below random", selectors, is_share=True),
    Verdict("selectors: loss", PROMPT, "bold cells", bold_of_selectors, trials=500),
    Verdict("overlap of two tables", HEAD, "p", overlap, power=0.7),
    *(Verdict(f"role: {kind}", PROMPT, "confident", roles(kind)) for kind in ("counts", "shares", "numbers")),
    Verdict("computed control", PROMPT, "confidently higher than the control", computed_control),
    Verdict("best head", PROMPT, "its interval is above that of the next head", best_head),
)


def findings(name: str, n: int, nulls: int, effects: int, seed: int = 0) -> tuple[int, int]:
    """Number of findings of a verdict in null experiments, and in experiments with an effect."""
    draw = next(verdict.draw for verdict in VERDICTS if verdict.name == name)
    random = np.random.default_rng([n, *name.encode(), *[seed] * bool(seed)])
    return sum(draw(random, n, False) for _ in range(nulls)), sum(draw(random, n, True) for _ in range(effects))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([findings(*asked) for asked in json.loads(sys.argv[1])]))

"""Ablation tests: accuracy on a task with some heads ablated, compared with random heads."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.ablated_measures import (
    KINDS,
    NATS,
    NEUTRAL,
    Ablations,
    neutral_loss,
    replies_to,
    source_of_numbers,
)
from interp.analyses.causal.function_identity import function_identity
from interp.analyses.causal.further_conditions import depth_conditions, further_conditions
from interp.analyses.causal.random_sets import Condition, RandomSets, excluded
from interp.analyses.causal.shared_forwards import SharedForwards
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.files import Parts, texts_from_tensor, texts_to_tensor
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.reply_limit import AT_LIMIT, WRONG_AT_LIMIT
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.analyses.results.shown_behaviour import COUNTED
from interp.analyses.results.trial import BASELINE, RANDOM_BY_LAYER, TOP, Trial
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.needle import judge
from interp.analyses.tasks.task import Judge
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

DEFAULT_JUDGE = judge


def ablation_test(
    model: nn.Module,
    prompts: Prompts,
    scores: HeadScores | HeadSet,
    *,
    n_heads: int = 10,
    n_random_sets: int = N_RANDOM_SETS,
    stop_early: bool = True,
    ablation: AblationKind = "zero",
    kinds: Sequence[AblationKind] = KINDS,
    reference: Prompts | None = None,
    neutral: Prompts | None = None,
    sufficiency: bool = True,
    depth: bool = True,
    judge: Judge = judge,
    right_only: bool = True,
    n_prompts: int | None = None,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> Trials:
    """Measure the accuracy on a task with the top heads of `scores` ablated, compared with random heads.

    `accuracy[p] = judge(reply of prompt p, prompt p)`, for greedy replies. The heads are ablated while the prompt is
    read and while the reply is generated.

    Random head sets are the control: `n_random_sets` with as many heads in each layer as the tested set, drawn from all
    heads of the layer, and up to 3 of other heads of any layer. `Trials.set_test` compares the tested set with the sets
    matched by layer. By default the draws end early where the verdict is certain.

    Use prompts that the scores were not made from.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with an answer in their meta, such as `tasks.needle`.
        scores: Head scores, or a set of heads. Heads without a score above 0 are never among the top.
        n_heads: Number of heads from the top of the scores.
        n_random_sets: Number of random sets that are matched by layer; a verdict needs at least 39.
        stop_early: End the draws where the verdict is certain: after 39 sets if none has as large an effect, or once
            too many have. False draws all sets.
        ablation: "zero", "mean", "resample", "uniform" or "first", see `ablate`.
        kinds: Other ablations of the tested heads; those of `ablation` count once.
        reference: Prompts that the ablations "mean" and "resample" take values from, by default the prompts of the
            test. Then "resample" needs two prompts, and is left out of `kinds` for a single one.
        neutral: Plain texts, whose loss is a further measure of the baseline and of tested heads.
        sufficiency: Add the condition "top kept".
        depth: Add the condition "top by depth".
        judge: Function of a reply and its prompt that returns whether the reply is right. With the default judge, a
            reply ends where it is right and no further text can change that.
        right_only: Use only the prompts that the unmodified model answers right. Where it answers none, no heads are
            ablated, and the baseline is all of the result. False uses all prompts.
        n_prompts: Number of these prompts that are used, at most; by default all.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the random heads, of "resample" and of the confidence intervals.
        folder: Where finished conditions are kept, so that an interrupted test continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        Trials: The measure "accuracy" under the conditions "baseline", "top", the further ones, "random" and "random by
        layer", with replies. Intervals are over prompts, and over draws and prompts for random heads. The facts of a
        trial, "at_limit" and "wrong_at_limit", are the shares of replies that ended at `max_new_tokens`, and of those
        that did and are wrong.

    Raises:
        UsageError: If there are no heads, no random sets or too few other heads to draw from, or if `folder` is given
            and the judge cannot be identified.

    Examples:
        >>> needles = interp.Prompts.encode(tokenizer, [{"text": "The key is 7. The key is", "meta": {"answer": "7"}}])
        >>> trials = interp.ablation_test(model, needles, scores, n_heads=2, n_random_sets=1, right_only=False)
        >>> trials.conditions
        ('baseline', 'top', 'top (mean)', 'top kept', 'top kept (mean)', 'top by depth', 'random', 'random by layer')

    Source:
        Wu et al. 2404.15574, section 3 (masking against random heads).

    Differs:
        Random heads never include heads above the threshold of the scores that are not tested. Random heads matched by
        layer are added, which may share heads with the tested set, and further conditions. The ablation is named.

    Limits:
        Where the prompts of the test are the reference, "resample" gives a prompt its own values in one of p cases.
        Does not show that other heads could not take over after training, nor what the heads compute.
    """
    from tqdm.auto import tqdm

    heads = scores.heads(top=n_heads, above=0.0) if isinstance(scores, HeadScores) else scores
    other = excluded(scores, heads) if isinstance(scores, HeadScores) else HeadSet(())
    name = scores.name if isinstance(scores, HeadScores) else "heads"
    sets = RandomSets(heads, HeadLayout.of(model), n_random_sets, seed, name, other, stop_early)
    kinds = _kinds(prompts, ablation, kinds, reference)
    source = Provenance.of(model, prompts.tokenizer, seed=seed)
    ablations = Ablations(model, prompts if reference is None else reference, seed)
    referred = [None if reference is None else reference.fingerprint(), seed]
    by = None if folder is None else function_identity(judge)
    counted: dict[str, list[int]] = {}
    if right_only:
        about = [*source_of_numbers(source), prompts.fingerprint(), max_new_tokens, by]
        replies_right = partial(_right, model, prompts, judge, max_new_tokens, batch_size)
        right = Parts.of(folder, "behaviour", about).get("right", replies_right)["right"].tolist()
        counted["accuracy"] = [sum(right), len(prompts)]
        items = tuple(compress(prompts, right))[: n_prompts or len(prompts)]
        prompts = replace(prompts, items=items or prompts.items)
    made_with = [*source_of_numbers(source), prompts.fingerprint(), max_new_tokens, referred, by]
    shared = SharedForwards.of(model, [heads])
    bar = tqdm(desc="ablation test", unit="head set", disable=not progress, delay=2, leave=False)

    def trial(condition: Condition, kind: AblationKind = ablation, texts: Prompts | None = None) -> Trial:
        def work() -> dict[str, Tensor]:
            passes = shared.record() if not len(condition.heads) else shared.resume(condition.heads)
            with ablations.ablate(condition.heads, kind), passes:
                replies = replies_to(model, prompts, max_new_tokens, batch_size, judge)
                more = {} if texts is None else {"neutral": neutral_loss(texts, batch_size)(model)}
            right = [bool(judge(reply.text, prompt)) for reply, prompt in zip(replies, prompts, strict=True)]
            ended = [reply.at_limit for reply in replies]
            stored = texts_to_tensor([reply.text for reply in replies])
            return {"right": torch.tensor(right), "at_limit": torch.tensor(ended), "replies": stored, **more}

        parts = Parts.of(folder, "ablation", [*made_with, kind, None if texts is None else texts.fingerprint()])
        made = parts.get(str(condition.heads), work)
        bar.update()
        cut, wrong = made["at_limit"], ~made["right"]
        return Trial(
            condition=condition.name,
            values={
                "accuracy": tuple(map(float, made["right"].tolist())),
                **({NEUTRAL: tuple(made["neutral"].tolist())} if texts is not None else {}),
            },
            heads=condition.heads,
            size=condition.size,
            draw=condition.draw,
            replies=texts_from_tensor(made["replies"]),
            facts={
                **condition.facts,
                AT_LIMIT: cut.float().mean().item(),
                WRONG_AT_LIMIT: (cut & wrong).float().mean().item(),
            },
        )

    with bar:
        trials = [trial(Condition(BASELINE, HeadSet(())), ablation, neutral)]
        random: list[Trial] = []
        # a model that answers nothing shows no behaviour that heads could have
        if counted.get("accuracy", [1])[0]:
            trials.append(trial(Condition(TOP, heads), ablation, neutral))
            random = sets.run(trial, trials[0], trials[1])
            others = further_conditions(TOP, scores, heads, (ablation, *kinds), sufficiency)
            trials += [trial(condition, kind, neutral) for condition, kind in others]
            trials += [trial(each, ablation, neutral) for each in depth_conditions(TOP, scores, heads, depth)]
    trials += [replace(each, matched=TOP) for each in random]
    questions, answers = (tuple(str(prompt.meta.get(key, "")) for prompt in prompts) for key in ("question", "answer"))
    return Trials(
        name=name,
        trials=tuple(trials),
        intervention=ablation,
        title="Ablation test",
        shares=("accuracy",),
        units={} if neutral is None else {NEUTRAL: NATS},
        control=RANDOM_BY_LAYER,
        claim="larger effect",
        n_random_sets=n_random_sets,
        questions=questions,
        answers=answers,
        seed=seed,
        settings={
            "n_heads": len(heads), "n_random_sets": n_random_sets, "ablation": ablation, "kinds": list(kinds),
            "max_new_tokens": max_new_tokens, "prompts": prompts.fingerprint(),
            **({COUNTED: counted} if counted else {}),
            **({} if judge is DEFAULT_JUDGE else {"judge": getattr(judge, "__name__", type(judge).__name__)}),
        },
        provenance=source,
    )  # fmt: skip


def _right(model: nn.Module, prompts: Prompts, judge: Judge, max_new_tokens: int, batch_size: int) -> dict[str, Tensor]:
    """Whether the unmodified model answers each prompt right."""
    replies = replies_to(model, prompts, max_new_tokens, batch_size, judge)
    return {
        "right": torch.tensor([bool(judge(reply.text, prompt)) for reply, prompt in zip(replies, prompts, strict=True)])
    }


def generate_ablated(
    model: nn.Module,
    prompts: Prompts,
    heads: HeadSet,
    ablation: AblationKind,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    *,
    reference: Prompts | None = None,
    seed: int = 0,
) -> list[Reply]:
    """Greedy replies, up to a newline, with heads ablated.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts.
        heads: Heads to ablate; an empty set leaves the model unmodified.
        ablation: The ablation, see `ablate`.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.
        reference: Prompts that the ablations "mean" and "resample" take values from.
        seed: Seed of "resample".

    Returns:
        list[Reply]: One reply for each prompt.
    """
    with ablate(model, heads, ablation, reference=reference, seed=seed):
        return replies_to(model, prompts, max_new_tokens, batch_size)


def _kinds(
    prompts: Prompts, ablation: AblationKind, kinds: Sequence[AblationKind], reference: Prompts | None
) -> list[AblationKind]:
    """The other ablations; a single prompt is no other prompt to resample from."""
    alone = len(prompts) < 2 and reference is None
    if ablation == "resample" and alone:
        raise UsageError(
            "ablation 'resample' takes values from other prompts, and there is one prompt; give reference= or more "
            "prompts."
        )
    return [kind for kind in kinds if kind != ablation and not (alone and kind == "resample")]

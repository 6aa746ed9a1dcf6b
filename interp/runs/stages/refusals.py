"""The stages of a safety run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from interp.analyses.causal.curve import causal_curve
from interp.analyses.identify.gradient_importance import gradient_importance, supporting
from interp.analyses.identify.sahara import SaharaResult, sahara
from interp.analyses.identify.ships import ships
from interp.analyses.measures import refusals as measures
from interp.analyses.measures.refusals import RefusalResult, Replies
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.trials import Trials
from interp.analyses.tasks import refusal
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.runs.stage import Stage, single

if TYPE_CHECKING:
    from interp.runs.run import Run
    from interp.runs.safety import SafetyPlan

HARMFUL, HARMLESS = "harmful", "harmless"
REPLIES = "replies.{}"
IMPORTANCE = "gradient_importance"


@dataclass(frozen=True, eq=False)
class Refusals:
    """Prompts and plan that the stages of one safety run share."""

    plan: "SafetyPlan"
    model: nn.Module
    prompts: dict[str, Prompts]
    """harmful, harmless, neutral, easy"""

    @classmethod
    def of(cls, plan: "SafetyPlan", model: nn.Module, tokenizer: Any) -> "Refusals":
        """Make the prompts of a plan. Raises PromptError for a file of requests that cannot be read."""
        harmful = (
            refusal.requests_from(plan.requests, tokenizer, plan.column)[: plan.n_harmful]
            if plan.requests
            else refusal.requests(tokenizer, HARMFUL, plan.n_harmful)
        )
        prompts = {
            HARMFUL: harmful,
            HARMLESS: refusal.requests(tokenizer, HARMLESS, plan.n_harmless),
            "neutral": refusal.neutral_texts(tokenizer, plan.n_neutral),
            "easy": refusal.easy(tokenizer, plan.n_easy),
        }
        return cls(plan, model, prompts)

    def replies(self, name: str) -> Stage:
        """Replies of the unmodified model to one set of requests; the second set is compared with the first."""

        def work(run: "Run", steps: Path) -> Result:
            found = measures.reply_to_requests(
                self.model, self.prompts[name], max_new_tokens=self.plan.reply_tokens, batch_size=self.plan.batch_size
            )
            return RefusalResult({name: found.record(self.plan.keep_text)}, provenance=run.provenance)

        asked = ((self.prompts[name], self.plan.reply_tokens),)
        return single(REPLIES.format(name), work, prompts=asked, shown=False)

    def importance(self) -> Stage:
        """Heads by how much they hold the first token of refusals up: the slope of its loss with its sign turned.

        Heads that oppose refusals come last. The slopes and their size are stored as extras.
        """

        def work(run: "Run", steps: Path) -> HeadScores:
            measures.check_contrast(self._replies(run, HARMFUL), self._replies(run, HARMLESS))
            scored, _ = self._split(run)
            slopes = gradient_importance(
                self.model, scored.prompts, loss=measures.first_token_loss(scored), normalize=None,
                batch_size=self.plan.batch_size, seed=self.plan.seed,
            )  # fmt: skip
            return supporting(slopes)

        return single(IMPORTANCE, work, needs=self._asked)

    def ships(self, ablation: str) -> Stage:
        """Heads by the divergence of the next token with each of them ablated."""

        def work(run: "Run", steps: Path) -> HeadScores:
            scored, _ = self._split(run)
            return ships(self.model, scored.prompts, **self._settings(ablation, steps))

        return single(f"ships.{ablation}", work, needs=(*self._asked, IMPORTANCE))

    def sahara(self, ablation: str) -> Stage:
        """The group of heads that turns the subspace of the requests furthest."""

        def work(run: "Run", steps: Path) -> SaharaResult:
            scored, _ = self._split(run)
            return sahara(self.model, scored.prompts, size=self.plan.group_size, **self._settings(ablation, steps))

        return single(f"sahara.{ablation}", work, needs=(*self._asked, IMPORTANCE), shown=False)

    def curve(self, ablation: str) -> Stage:
        """Refusals and what else changes with the first heads of every ranking ablated."""

        def work(run: "Run", steps: Path) -> Trials:
            plan, size = self.plan, self.plan.batch_size
            _, tested = self._split(run)
            group: Any = run.result(f"sahara.{ablation}")
            rankings: dict[str, Any] = {
                "ships": run.result(f"ships.{ablation}"),
                "sahara": list(group.ranking),
                "gradient": run.result(IMPORTANCE),
            }
            layout = HeadLayout.of(self.model)
            found = causal_curve(
                self.model,
                rankings,
                {
                    "refused": measures.refusals(tested.prompts, max_new_tokens=plan.reply_tokens, batch_size=size),
                    "harmless refused": measures.refusals(
                        self.prompts[HARMLESS], max_new_tokens=plan.reply_tokens, batch_size=size
                    ),
                    "easy right": measures.right_answers(self.prompts["easy"], batch_size=size),
                    "neutral loss": measures.losses(self.prompts["neutral"], batch_size=size),
                },
                sizes=[n for n in plan.head_set_sizes if n <= layout.size // 2],
                shown={"refused": 0.5},
                ablation=cast(Literal["uniform", "zero"], ablation),
                n_random_sets=plan.n_random_sets,
                until=plan.stop_below,
                seed=plan.seed,
                folder=steps,
                about=[
                    tested.prompts.fingerprint(), *(asked.fingerprint() for asked in self.prompts.values()),
                    plan.reply_tokens,
                ],
            )  # fmt: skip
            shares = ("refused", "harmless refused", "easy right")
            return replace(found, name=f"refusals.{ablation}", shares=shares)

        needs = (*self._asked, IMPORTANCE, f"ships.{ablation}", f"sahara.{ablation}")
        asked = tuple((self.prompts[name], self.plan.reply_tokens) for name in ("easy", "neutral"))
        return single(f"curve.{ablation}", work, needs=needs, prompts=asked, shown=False)

    def whole(self) -> Stage:
        """All of it in one result."""

        def work(run: "Run", steps: Path) -> RefusalResult:
            replies: dict[str, Any] = {}
            for name in (HARMFUL, HARMLESS):
                stored: Any = run.result(REPLIES.format(name))
                replies |= stored.replies
            groups: dict[str, Any] = {kind: run.result(f"sahara.{kind}") for kind in self.plan.ablations}
            curves: dict[str, Any] = {kind: run.result(f"curve.{kind}") for kind in self.plan.ablations}
            trials = {kind: group.groups for kind, group in groups.items()}
            return RefusalResult(replies, trials, curves, run.provenance)

        needs = [f"{part}.{ablation}" for ablation in self.plan.ablations for part in ("sahara", "curve")]
        return single("refusals", work, needs=(*self._asked, *needs))

    @property
    def _asked(self) -> tuple[str, ...]:
        return (REPLIES.format(HARMFUL), REPLIES.format(HARMLESS))

    def _settings(self, ablation: str, steps: Path) -> dict[str, Any]:
        # the requests were refused before, so they are not judged again
        return {
            "ablation": ablation, "judge": None, "batch_size": self.plan.batch_size, "seed": self.plan.seed,
            "folder": steps,
        }  # fmt: skip

    def _replies(self, run: "Run", name: str) -> Replies:
        """The replies that were stored, on their prompts."""
        stored: Any = run.result(REPLIES.format(name))
        found = stored.replies[name]
        return Replies(self.prompts[name], found.begins, found.refused, found.first_tokens)

    def _split(self, run: "Run") -> tuple[Replies, Replies]:
        """Refused requests that heads are scored on, and others that they are tested on; few of them are halved."""
        harmful = self._replies(run, HARMFUL)
        refused = [number for number, verdict in enumerate(harmful.refused) if verdict]
        enough = len(refused) >= self.plan.n_scored + self.plan.n_tested
        border = self.plan.n_scored if enough else len(refused) // 2
        tested = refused[border:][: self.plan.n_tested]
        return harmful.select(refused[:border]), harmful.select(tested)

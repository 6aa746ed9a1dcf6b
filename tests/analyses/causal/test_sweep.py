"""Sweeps over heads: every intervention against its literal rule, resumed, out of memory, and with a custom metric."""

import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from steering_oracle import literal

from interp.analyses.causal import batched_interventions as reader
from interp.analyses.causal import sweep
from interp.analyses.causal.batch_size import halved
from interp.analyses.causal.sweep import Cell, kl, last_hidden, sweep_sets
from interp.errors import HeadError, InterpError, ModelError, PromptError, ScoreError, UsageError
from interp.hooks.edit.ablation import Intervention, intervene
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing.families import VOCAB, make

BEGINNING = [5, 9, 11, 4, 8, 77]


def prompts(lengths=(9, 14, 14), seed=0, beginning=BEGINNING):
    rng = torch.Generator().manual_seed(seed)
    rows = [[*beginning, *torch.randint(3, VOCAB, (n - len(beginning),), generator=rng).tolist()] for n in lengths]
    return Prompts.from_ids(rows)


def written(model, batch):
    """z [q h d] by layer of each prompt, from the eager attention of the tests."""
    found = []
    for prompt in batch:
        held = {}

        def keep(layer, z, held=held):
            held[layer] = z[0].transpose(0, 1)
            return z

        with literal(model, outputs=keep), torch.no_grad():
            model(input_ids=torch.tensor([prompt.ids]))
        found.append(held)
    return found


def rules(model, kind, heads, reference, number):
    """How the literal attention changes its pattern and the outputs of heads."""
    by_layer = heads.by_layer()
    theirs = [] if reference is None else written(model, reference)

    def rule(layer, pattern):
        own = list(by_layer.get(layer, ()))
        if own and kind == "uniform":
            seen = (pattern[:, own] > 0).to(pattern.dtype)
            pattern = pattern.clone()
            pattern[:, own] = seen / seen.sum(-1, keepdim=True)
        if own and kind == "first":
            pattern = pattern.clone()
            pattern[:, own] = 0.0
            pattern[:, own, :, 0] = 1.0
        return pattern

    def outputs(layer, z):
        z = z.clone()
        for head in by_layer.get(layer, ()):
            if kind == "zero":
                z[:, head] = 0.0
            elif kind == "scale":
                z[:, head] *= 0.3
            elif kind == "mean":
                z[:, head] = torch.cat([one[layer][:, head] for one in theirs]).mean(0)
            elif kind in ("resample", "patch"):
                other = theirs[number][layer][:, head]
                place = torch.arange(z.shape[2]).clamp(max=len(other) - 1)
                z[:, head] = other[place]
        return z

    return {"rule": rule, "outputs": outputs}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "uniform", "first", "scale", "patch"])
def test_every_intervention_is_its_literal_rule(name, kind):
    model, batch = make(name, layers=3), prompts()
    reference = {"mean": prompts((12, 8), 1), "resample": prompts((16, 9), 1), "patch": prompts(seed=2)}.get(kind)
    change = Intervention(kind, 0.3 if kind == "scale" else None, reference, seed=3)
    sets = [HeadSet.parse(words) for words in ("L0H1", "L2H3", "L1H0, L1H2", "L0H3, L2H0", "L1H1")]
    found = sweep_sets(model, batch, [*sets, HeadSet(())], change, batch_size=2)
    source = change.source(batch)
    for number, prompt in enumerate(batch):
        with torch.no_grad(), literal(model):
            base = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double().log_softmax(-1)
        for i, heads in enumerate(sets):
            one = rules(model, kind, heads, reference, 0 if source is None else int(source[number]))
            with torch.no_grad(), literal(model, **one):
                after = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double().log_softmax(-1)
            wanted = float((base.exp() * (base - after)).sum())
            assert abs(wanted - float(found.values[number, i])) < 1e-5
    assert (found.values[:, :5] > 1e-6).all()
    assert (found.values[:, 5] == 0).all()


def test_a_shared_beginning_changes_nothing_and_spares_work(monkeypatch):
    model, batch = make("llama", layers=3), prompts((9, 14, 14, 11))
    sets = [HeadSet((head,)) for head in HeadLayout.of(model).all()]
    shared = sweep_sets(model, batch, sets, "zero")
    monkeypatch.setattr(reader, "MIN_SHARED_TOKENS", 1000)
    alone = sweep_sets(model, batch, sets, "zero")
    single = torch.cat([sweep_sets(model, batch[i : i + 1], sets, "zero").values for i in range(len(batch))])
    torch.testing.assert_close(shared.values, alone.values, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(alone.values, single, atol=1e-6, rtol=1e-4)
    assert shared.forwards < 0.75 * alone.forwards
    assert alone.forwards == pytest.approx(4 + 4 * 4 * (1 + 2 / 3 + 1 / 3))


def test_the_table_names_heads_and_the_ablation():
    model, batch = make("llama"), prompts()
    some = HeadSet.parse("L0H1, L1H2")
    found = sweep.sweep(model, batch, "zero", heads=some)
    assert found.name == "kl:zero"
    assert HeadSet.from_mask(~found.values.isnan()) == some
    whole = sweep.sweep(model, batch, "zero")
    torch.testing.assert_close(found.per_prompt[:, 1, 2], whole.per_prompt[:, 1, 2], atol=1e-6, rtol=1e-4)


def test_a_custom_metric_sees_rows_in_order():
    model, batch = make("llama"), prompts()

    def third(logits, seen):
        assert logits.shape == seen.base.shape
        assert len(seen.prompts) == len(logits)
        return logits[:, 3] + 100 * torch.tensor([len(prompt) for prompt in seen.prompts])

    found = sweep.sweep(model, batch, "zero", third)
    for number, length in enumerate(batch.lengths):
        assert ((found.per_prompt[number] - 100 * length).abs() < 50).all()


def test_the_last_hidden_states_are_transformers_own():
    model, batch = make("gpt2"), prompts()
    found = sweep_sets(model, batch, [HeadSet(())], "zero", last_hidden).values
    for number, prompt in enumerate(batch):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True)
        torch.testing.assert_close(found[number, 0], out.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5)


def test_killed_at_any_moment_it_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    model, batch = make("llama", layers=3), prompts((9, 14, 14, 11))
    monkeypatch.setattr(sweep, "SETS_PER_CELL", 3)
    whole = sweep.sweep(model, batch, "uniform", batch_size=2)
    calls = []
    run = Cell.run

    def counted(self, *rest):
        calls.append((self.prompts.fingerprint(), self.sets))
        return run(self, *rest)

    monkeypatch.setattr(Cell, "run", counted)
    for stop in range(1, 9):

        def stopping(self, *rest, stop=stop):
            if len(calls) == stop:
                raise KeyboardInterrupt
            return counted(self, *rest)

        monkeypatch.setattr(Cell, "run", stopping)
        if stop < 8:
            with pytest.raises(KeyboardInterrupt):
                sweep.sweep(model, batch, "uniform", batch_size=2, folder=tmp_path)
    monkeypatch.setattr(Cell, "run", counted)
    again = sweep.sweep(model, batch, "uniform", batch_size=2, folder=tmp_path)
    assert torch.equal(again.per_prompt, whole.per_prompt)
    assert len(calls) == len(set(calls)) == 8
    calls.clear()
    sweep.sweep(model, batch, "zero", batch_size=2, folder=tmp_path)
    assert len(calls) == 8
    for path in tmp_path.iterdir():
        path.write_bytes(b"no tensors")
    with pytest.raises(ScoreError, match="delete it"):
        sweep.sweep(model, batch, "uniform", batch_size=2, folder=tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory"), MemoryError()])
def test_where_memory_runs_out_batches_halve(monkeypatch, error):
    model, batch = make("llama"), prompts()
    whole = sweep.sweep(model, batch, "zero")
    read, sizes = reader.BatchedInterventions._read, []

    def scarce(self, sets, first):
        sizes.append(len(sets))
        if len(sets) > 1:
            raise error
        return read(self, sets, first)

    monkeypatch.setattr(reader.BatchedInterventions, "_read", scarce)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = sweep.sweep(model, batch, "zero")
    assert sizes[:3] == [4, 2, 1]
    torch.testing.assert_close(found.per_prompt, whole.per_prompt, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(reader.BatchedInterventions, "_read", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(InterpError, match="batch_size"), pytest.warns(UserWarning, match="memory"):
        sweep.sweep(model, batch, "zero")


def test_a_cell_travels():
    model, batch = make("llama"), prompts()
    cell = Cell(batch, (HeadSet.parse("L0H1"), HeadSet.parse("L1H0, L1H3")), Intervention("patch", reference=batch))
    again = pickle.loads(pickle.dumps(cell))
    assert torch.equal(again.run(model), cell.run(model))
    # patched with itself, a prompt stays as it is
    assert (again.run(model) < 1e-6).all()


def test_rows_by_hand_give_the_same():
    model, batch = make("qwen2"), prompts()
    one, many = (sweep.sweep(model, batch, "first", rows=rows).per_prompt for rows in (1, 64))
    torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-4)


def above(limit):
    return lambda logits, batch: (logits > limit).float().sum(-1)


def larger(logits, batch, limit=0.0):
    return (logits > limit).float().sum(-1)


@pytest.mark.parametrize(
    "pair", [(above(0.0), above(0.5)), (partial(larger, limit=0.1), partial(larger, limit=0.4)), (larger, above(0.2))]
)
def test_stored_cells_are_of_their_own_metric(tmp_path, pair):
    model, batch = make("llama"), prompts()
    for metric in pair:
        fresh = sweep.sweep(model, batch, "zero", metric)
        for _ in range(2):
            kept = sweep.sweep(model, batch, "zero", metric, folder=tmp_path)
            assert torch.equal(kept.per_prompt, fresh.per_prompt)
    assert not torch.equal(*(sweep.sweep(model, batch, "zero", metric, folder=tmp_path).values for metric in pair))


def test_a_metric_that_cannot_be_identified_is_not_stored(tmp_path):
    held = (number for number in range(3))

    def odd(logits, batch):
        return logits[:, 0] * (held is not None)

    with pytest.raises(UsageError, match="cannot be pickled"):
        sweep.sweep(make("llama"), prompts(), "zero", odd, folder=tmp_path)
    assert sweep.sweep(make("llama"), prompts(), "zero", odd).counted == 3


def test_memory_that_ran_out_is_free_for_the_next_try():
    held = []

    def greedy():
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("x")

    gc.disable()
    try:
        assert halved(greedy, True) is None
        assert held[0]() is None
    finally:
        gc.enable()


def test_heads_as_elsewhere():
    model, batch = make("llama"), prompts()
    one = sweep.sweep(model, batch, "zero", heads="L0H1, L1H2")
    assert torch.equal(
        one.per_prompt.nan_to_num(9), sweep.sweep(model, batch, "zero", heads=["L0H1", (1, 2)]).per_prompt.nan_to_num(9)
    )
    sets = sweep_sets(model, batch, ["L0H1", "L1H2"], "zero").values
    torch.testing.assert_close(sets[:, 0], one.per_prompt[:, 0, 1], atol=1e-6, rtol=1e-4)


def nan(logits, batch):
    return torch.full((len(logits),), torch.nan)


def short(logits, batch):
    return logits.mean()


def number(logits, batch):
    return 1.0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"metric": nan}, UsageError, "metric nan gave NaN"),
        ({"metric": short}, UsageError, r"metric short gave shape \(\)"),
        ({"metric": number}, UsageError, "metric number gave float"),
        ({"metric": last_hidden}, UsageError, "use sweep_sets"),
        ({"kind": "none"}, UsageError, "unknown ablation 'none'"),
        ({"kind": "mean"}, UsageError, "needs reference"),
        ({"heads": HeadSet(())}, UsageError, "empty set"),
        ({"heads": HeadSet.parse("L7H0")}, HeadError, "layer 7"),
        ({"kind": "resample"}, UsageError, "needs reference"),
        ({"batch_size": 0}, UsageError, "at least 1"),
        ({"prompts": prompts()[:0]}, PromptError, "selection of prompts is empty"),
        ({"prompts": Prompts.from_ids([[3] * 2049])}, PromptError, "2,049 tokens"),
        ({"kind": Intervention("patch", reference=prompts((9, 9, 9)))}, PromptError, "equal lengths"),
    ],
)
def test_bad_input(change, error, text):
    model = make("llama")
    before = torch.cat([p.flatten() for p in model.parameters()])
    given = {"prompts": prompts(), "kind": "zero", "metric": kl} | change
    with pytest.raises(error, match=text):
        sweep.sweep(model, given.pop("prompts"), given.pop("kind"), given.pop("metric"), **given)
    assert torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_in_training_mode_and_empty_input_are_refused():
    model, batch = make("gpt2"), prompts()
    with pytest.raises(UsageError, match="no reference prompts"):
        Intervention("mean", reference=batch[:0])
    with pytest.raises(UsageError, match="no head set"):
        sweep_sets(model, batch, [], "zero")
    with (
        pytest.raises(UsageError, match="reference prompt of each prompt"),
        intervene(model, Intervention("patch", reference=batch), [HeadSet.parse("L0H1")]),
    ):
        pass
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        sweep.sweep(model, batch, "zero")

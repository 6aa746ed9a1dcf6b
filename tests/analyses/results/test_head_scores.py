import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.intervals import column_intervals
from interp.errors import HeadError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadSet
from interp.hooks.model.provenance import Provenance

NAN = math.nan


def random_scores(n=12, layers=3, heads=4, seed=0, **settings):
    values = torch.rand(n, layers, heads, generator=torch.Generator().manual_seed(seed))
    return HeadScores("retrieval", values, **settings)


def llama(layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=64
        )
    )


def test_a_score_is_the_mean_over_the_prompts_that_count():
    scores = HeadScores("x", torch.tensor([[[1.0, 0.0, NAN]], [[0.5, NAN, NAN]], [[NAN, NAN, NAN]]]))
    assert scores.values.dtype == torch.float32
    assert scores.values[0, :2].tolist() == [0.75, 0.0]
    assert scores.values[0, 2].isnan()
    assert scores.frequency[0, :2].tolist() == [1.0, 0.0]
    assert scores.counted == 2
    assert (scores.layers, scores.n_heads, len(scores)) == (1, 3, 3)


def test_means_agree_with_float64():
    scores = random_scores(n=200, heads=32)
    expected = scores.per_prompt.double().mean(0).float()
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=6e-8)


def test_the_order_of_heads_is_by_value():
    scores = HeadScores("x", torch.tensor([[[0.5, 0.9, 0.1], [NAN, 0.5, 0.2]]]))
    assert scores.top(10) in (
        [Head(0, 1), *tied, Head(1, 2), Head(0, 2)] for tied in ([Head(0, 0), Head(1, 1)], [Head(1, 1), Head(0, 0)])
    )
    assert scores.top(1) == [Head(0, 1)]
    assert scores.heads(top=3) == HeadSet.parse("L0H0 L0H1 L1H1")
    assert scores.select(above=0.5) == HeadSet.parse("L0H1")
    assert scores.heads(top=1, above=0.0) == HeadSet.parse("L0H1")
    assert dataclasses.replace(scores, threshold=0.4).heads() == HeadSet.parse("L0H0 L0H1 L1H1")
    with pytest.raises(UsageError, match="no threshold"):
        scores.heads()
    with pytest.raises(UsageError, match="0 or more"):
        scores.top(-1)


def test_heads_are_looked_up_by_name():
    scores = random_scores()
    assert scores["L2H3"] == scores[2, 3] == float(scores.values[2, 3])
    assert [scores[head] for head in scores] == scores.values.flatten().tolist()
    with pytest.raises(HeadError, match=r"^L3H0: layer 3 of a 3-layer model"):
        scores["L3H0"]


def test_the_interval_is_the_percentile_bootstrap_over_prompts():
    torch.manual_seed(0)
    scores = HeadScores("x", torch.randn(400, 1, 2) * torch.tensor([1.0, 3.0]))
    low, high = scores.interval(n_resamples=4000)
    error = scores.per_prompt.std(0) / 20
    torch.testing.assert_close((high - low) / 2, 1.96 * error, rtol=0.06, atol=0)
    torch.testing.assert_close((high + low) / 2, scores.values, rtol=0, atol=0.02)
    narrow = scores.interval(level=0.5)
    assert ((narrow[1] - narrow[0]) < (high - low) / 2).all()


def test_the_interval_covers_the_truth_as_often_as_it_says():
    torch.manual_seed(1)
    scores = HeadScores("x", (torch.rand(60, 20, 50) < 0.3).float())
    low, high = scores.interval()
    covered = ((low <= 0.3) & (high >= 0.3)).float().mean()
    assert 0.90 < covered < 0.98


def test_prompts_that_do_not_count_change_no_interval():
    scores = random_scores()
    holes = torch.full_like(scores.per_prompt, NAN)
    widened = dataclasses.replace(scores, per_prompt=torch.stack([scores.per_prompt, holes], 1).flatten(0, 1))
    assert all(map(torch.equal, scores.interval(), widened.interval()))
    assert torch.equal(scores.values, widened.values)


def test_a_head_counts_by_its_own_prompts():
    values = random_scores().per_prompt.clone()
    values[::2, 0, 0] = NAN
    values[1:, 0, 1] = NAN
    scores = HeadScores("x", values)
    assert scores.low[0, 0] < scores.values[0, 0] < scores.high[0, 0]
    assert scores.low[0, 1].isnan()
    assert scores[0, 1] == float(values[0, 0, 1])


def test_chunks_do_not_change_the_interval():
    values = random_scores().per_prompt.flatten(1)
    whole = column_intervals(values)
    assert torch.equal(column_intervals(values, max_elements=5000), whole)
    assert torch.equal(torch.stack(random_scores().interval()).flatten(1), whole)


@pytest.mark.slow
def test_intervals_are_bit_equal_in_another_process_with_other_threads():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\nimport torch; torch.set_num_threads(2)\n"
        "from interp.analyses.results.head_scores import HeadScores\n"
        "values = torch.rand(37, 6, 50, generator=torch.Generator().manual_seed(5))\n"
        "scores = HeadScores('x', values, seed=3)\n"
        "print(torch.stack([scores.low, scores.high, scores.values]).numpy().tobytes().hex())"
    )
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scores = HeadScores("x", torch.rand(37, 6, 50, generator=torch.Generator().manual_seed(5)), seed=3)
    here = torch.stack([scores.low, scores.high, scores.values]).numpy().tobytes().hex()
    torch.set_num_threads(torch_threads)
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert found.stdout.strip() == here
    assert not torch.equal(dataclasses.replace(scores, seed=4).low, scores.low)


def test_the_order_of_prompts_changes_no_mean():
    scores = random_scores(n=301, heads=40)
    assert torch.equal(dataclasses.replace(scores, per_prompt=scores.per_prompt.flip(0)).values, scores.values)


def test_tables_that_agree_are_told_from_chance():
    torch.manual_seed(0)
    base = torch.rand(1, 8, 8)
    one, near = HeadScores("one", base), HeadScores("near", base + 0.01 * torch.rand(1, 8, 8))
    far, flat = HeadScores("far", torch.rand(1, 8, 8)), HeadScores("flat", torch.zeros(1, 8, 8))
    same = one.compare(near, k=8)
    assert same.spearman > 0.99
    assert same.pearson > 0.99
    assert same.overlap >= 7
    assert same.p_overlap < 0.01
    assert same.expected_overlap == 1.0
    assert one.compare(far, k=8).p_overlap > 0.05
    assert abs(one.compare(far, k=8).spearman) < 0.4
    assert math.isnan(one.compare(flat, k=8).spearman)
    assert one.compare(near, k=8) == one.compare(near, k=8)


def test_ranks_of_a_comparison_are_scipys():
    from scipy.stats import spearmanr

    one, other = random_scores(n=1), random_scores(n=1, seed=1)
    expected = spearmanr(one.values.flatten(), other.values.flatten())[0]
    assert one.compare(other, k=2).spearman == pytest.approx(expected)


def test_the_p_of_an_overlap_in_one_layer_is_hypergeometric():
    from scipy.stats import hypergeom

    one = HeadScores("one", torch.arange(1.0, 25.0).view(1, 1, 24))
    other = HeadScores("other", torch.arange(1.0, 25.0).roll(4).view(1, 1, 24))
    found = one.compare(other, k=8)
    assert found.overlap == 4
    assert found.p_overlap == pytest.approx(hypergeom.sf(3, 24, 8, 8))


def test_comparisons_need_one_shape_and_a_k_within_it():
    with pytest.raises(ScoreError, match="3x4 heads and 'retrieval' has 3x5"):
        random_scores().compare(random_scores(heads=5))
    with pytest.raises(UsageError, match="k from 1 to 12"):
        random_scores().compare(random_scores(), k=13)


def test_random_heads_are_none_of_the_top():
    scores = random_scores()
    top = scores.heads(top=3)
    for match in ("free", "layer"):
        drawn = scores.random_like(3, seed=1, match=match)
        assert drawn == scores.random_like(top, seed=1, match=match)
        assert len(drawn) == 3
        assert not drawn & top


def test_saved_scores_come_back_bit_for_bit(tmp_path):
    values = random_scores().per_prompt.clone()
    values[0, 1] = NAN
    scores = HeadScores(
        "retrieval",
        values,
        "share",
        kv_heads=2,
        threshold=0.1,
        settings={"lengths": (512, 1024), "kind": "literal"},
        provenance=Provenance.of(llama()),
        extras={"hits": torch.arange(12 * 3 * 4 * 2).view(12, 3, 4, 2), "half": values.to(torch.bfloat16)},
        seed=5,
        labels=tuple(f"prompt {i}" for i in range(12)),
    )
    path = scores.save(tmp_path / "table")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.json", "table.safetensors"]
    back = HeadScores.load(path)
    assert back.per_prompt.numpy().tobytes() == scores.per_prompt.numpy().tobytes()
    assert torch.equal(back.extras["hits"], scores.extras["hits"])
    assert back.extras["half"].dtype == torch.bfloat16
    for key in ("name", "unit", "kv_heads", "threshold", "settings", "provenance", "seed", "labels"):
        assert getattr(back, key) == getattr(scores, key)
    assert torch.equal(back.low, scores.low)
    assert str(tmp_path) not in path.read_text()


def test_scores_of_another_model_are_refused(tmp_path):
    model, other = llama(), llama(layers=3)
    path = dataclasses.replace(random_scores(), provenance=Provenance.of(model)).save(tmp_path / "a.json")
    assert HeadScores.load(path, model).name == "retrieval"
    with pytest.raises(ScoreError) as caught:
        HeadScores.load(path, other)
    for known in (model, other):
        assert Provenance.of(known).weights_hash in str(caught.value)
    nameless = random_scores().save(tmp_path / "b.json")
    with pytest.raises(ScoreError, match="does not name the model it belongs to"):
        HeadScores.load(nameless, model)


def edit(path, **changes):
    about = json.loads(path.read_text())
    # a file that other programs write has no checksum
    about.pop("sha256")
    about.update(changes)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text(path.read_text()[:40]), "is not JSON"),
        (lambda path: path.write_text("[]"), "holds a list, expected an object"),
        (lambda path: path.write_text("[" * 100_000), "is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xff"), "UTF-8"),
        (lambda path: edit(path, format="interp.head_scores/9"), "head_scores/9"),
        (lambda path: edit(path, settings=None), 'no usable "settings"'),
        (lambda path: edit(path, threshold="high"), 'no usable "threshold"'),
        (lambda path: edit(path, kv_heads=3), "not a valid layout"),
        (lambda path: edit(path, labels=["one"]), "1 labels for 12 prompts"),
        (lambda path: edit(path, provenance={"model": "x"}), 'has no entry "architecture"'),
        (lambda path: edit(path, provenance=[]), "no usable \"provenance\""),
        (lambda path: path.with_suffix(".safetensors").unlink(), "needs a.safetensors next to it"),
        (lambda path: path.with_suffix(".safetensors").write_bytes(b"x"), "does not belong to a.json"),
        (lambda path: random_scores(seed=1).save(path.with_name("b")).with_suffix(".safetensors").replace(
            path.with_suffix(".safetensors")), "does not belong"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_in_one_sentence(tmp_path, damage, message):
    path = random_scores().save(tmp_path / "a.json")
    damage(path)
    with pytest.raises(ScoreError, match=message) as caught:
        HeadScores.load(path)
    assert "a." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken.safetensors").mkdir()
    for path in (tmp_path / "missing" / "a.json", tmp_path / "taken.json"):
        with pytest.raises(ScoreError, match="cannot be written"):
            random_scores().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["taken.safetensors"]


def test_parts_join_to_the_whole():
    whole = random_scores(labels=tuple("abcdefghijkl"), extras={"x": torch.arange(144).view(12, 3, 4)})
    parts = [
        dataclasses.replace(
            whole,
            per_prompt=whole.per_prompt[rows],
            labels=whole.labels[rows],
            extras={"x": whole.extras["x"][rows]},
        )
        for rows in (slice(0, 5), slice(5, 12))
    ]
    joined = HeadScores.concat(parts)
    assert torch.equal(joined.per_prompt, whole.per_prompt)
    assert torch.equal(joined.extras["x"], whole.extras["x"])
    assert joined.labels == whole.labels
    assert torch.equal(joined.low, whole.low)


def test_joined_extras_are_filled_up_where_they_are_shorter():
    one = random_scores(n=1, extras={"x": torch.ones(1, 3, 4, 2), "i": torch.ones(1, 3, 4, 1, dtype=torch.int64)})
    two = random_scores(n=1, extras={"x": torch.ones(1, 3, 4, 1), "i": torch.ones(1, 3, 4, 2, dtype=torch.int64)})
    extras = HeadScores.concat([one, two]).extras
    assert extras["x"][1, 0, 0, 1].isnan()
    assert extras["x"][:, 0, 0, 0].tolist() == [1, 1]
    assert extras["i"][:, 0, 0].tolist() == [[1, -1], [1, 1]]


def test_only_parts_of_one_analysis_join():
    scores = random_scores()
    with pytest.raises(ScoreError, match="differ in name"):
        HeadScores.concat([scores, dataclasses.replace(scores, name="sinks")])
    with pytest.raises(ScoreError, match="differ in n_heads"):
        HeadScores.concat([scores, random_scores(heads=5)])
    with pytest.raises(ScoreError, match="differ in extras"):
        HeadScores.concat([scores, random_scores(extras={"x": torch.ones(12, 3, 4)})])
    with pytest.raises(ScoreError, match="at least one"):
        HeadScores.concat([])
    one, other = (dataclasses.replace(scores, provenance=Provenance.of(llama(layers))) for layers in (2, 3))
    with pytest.raises(ScoreError, match="belong to"):
        HeadScores.concat([one, other])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_prompt": torch.ones(2, 2)}, r"shape \[2, 2\]; give \[prompts, layers, heads\]"),
        ({"per_prompt": torch.ones(0, 2, 2)}, r"shape \[0, 2, 2\]"),
        ({"per_prompt": torch.full((1, 2, 2), math.inf)}, "infinite"),
        ({"labels": ("a",)}, "1 labels for 2 prompts"),
        ({"kv_heads": 3}, "not a valid layout"),
        ({"extras": {"x": torch.ones(3, 2, 2)}}, r"extra 'x' of scores 'x' has shape \[3, 2, 2\]"),
        ({"settings": {"tensor": torch.ones(1)}}, "cannot be written as JSON"),
        ({"settings": {"value": NAN}}, "cannot be written as JSON"),
    ],
)
def test_scores_that_make_no_table_are_refused(settings, message):
    with pytest.raises(ScoreError, match=message):
        HeadScores(**{"name": "x", "per_prompt": torch.ones(2, 2, 2), **settings})


def test_bootstrap_settings_are_checked():
    with pytest.raises(UsageError, match="between 0 and 1"):
        random_scores().interval(level=95)


def test_the_frame_has_a_row_for_each_head():
    scores = random_scores()
    frame = scores.to_frame()
    assert list(frame) == ["layer", "head", "name", "value", "low", "high", "frequency"]
    assert len(frame) == len(scores) == 12
    assert frame.loc[frame.name == "L1H2", "value"].item() == scores[1, 2]
    assert (frame.low < frame.value).all()


def test_reprs_are_one_line_and_escaped():
    scores = HeadScores("retrieval", torch.tensor([[[0.5, 1.0]], [[0.0, 1.0]]]))
    assert repr(scores) == "HeadScores('retrieval', 1x2, n=2, top L0H1 1.00 [0.16, 1.00])"
    assert repr(HeadScores("x", torch.ones(1, 1, 1))) == "HeadScores('x', 1x1, n=1, top L0H0 1.00)"
    assert repr(HeadScores("x", torch.full((1, 1, 1), NAN))) == "HeadScores('x', 1x1, n=0)"
    html = HeadScores("<script>", torch.ones(1, 1, 1), "<b>")._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<b>" not in html


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_a_group_has_the_score_of_its_best_query_head(kv_heads):
    scores = random_scores(heads=6, kv_heads=kv_heads)
    each = 6 // kv_heads
    for layer in range(3):
        for group in range(kv_heads):
            own = [scores[f"L{layer}H{head}"] for head in range(group * each, (group + 1) * each)]
            assert scores.by_group()[layer, group] == max(own)
    assert torch.equal(random_scores(heads=6).by_group(kv_heads), scores.by_group())


def test_a_threshold_curve_leaves_heads_at_the_threshold_out():
    scores = HeadScores("x", torch.tensor([0.25, 0.5, 0.5, 0.75]).expand(3, 1, 4))
    assert [point.above for point in scores.threshold_curve([0.25, 0.5, 0.6, 0.75])] == [3, 1, 1, 0]

import json
import math

import pytest
import torch
import yaml

from interp.analyses.formats import (
    read_duo_attention,
    read_qrhead,
    read_retrieval_head,
    write_duo_attention,
    write_qrhead,
    write_retrieval_head,
)
from interp.analyses.scores import HeadScores
from interp.hooks.heads import Head, HeadLayout, HeadSet
from interp.kernels.errors import ScoreError

LAYOUT = HeadLayout(3, 4, 2, 8)
NAN = math.nan


def test_retrieval_scores_are_means_over_instances(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"0-0": [0.0, 0.0, 0], "1-3": [1.0, 0.5, 0], "2-1": [0.25, 0, 0]}) + "\n")
    scores = read_retrieval_head(path, LAYOUT)
    assert scores.top(2) == [Head(1, 3), Head(2, 1)]
    assert scores["L1H3"] == 0.5
    assert scores.heads() == HeadSet.parse("L1H3")
    assert scores.frequency[2, 1] == pytest.approx(1 / 3)
    assert scores.values[0, 1].isnan()
    assert scores.settings["zero_instances"] == 1
    assert (scores.kv_heads, scores.counted) == (2, 3)
    assert read_retrieval_head(path).values.shape == (3, 4)


def test_shorter_lists_are_filled_up(tmp_path):
    path = tmp_path / "ragged.json"
    path.write_text('{"0-0": [1.0, 0.5], "0-1": [1.0], "1-0": []}')
    scores = read_retrieval_head(path)
    assert scores.values[0].tolist() == [0.75, 1.0]
    assert scores.values[1, 0].isnan()


def test_retrieval_scores_come_back_as_written(tmp_path):
    values = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0))
    values[2] = NAN
    path = write_retrieval_head(HeadScores("retrieval", values), tmp_path / "out.json")
    assert path.read_text().count("\n") == 1
    back = read_retrieval_head(path)
    assert torch.equal(back.per_prompt, values[[0, 1, 3, 4]])
    assert json.loads(path.read_text())["2-3"] == values[[0, 1, 3, 4], 2, 3].tolist()


def test_gates_are_per_kv_head_until_asked_otherwise(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("-1.0e-04\t1.0\n9.609375e-01\t0.5\n0.25\t0.75\n")
    table = read_duo_attention(path)
    assert table.values.tolist() == [[pytest.approx(-1e-4), 1.0], [0.9609375, 0.5], [0.25, 0.75]]
    assert read_duo_attention(tmp_path).values.equal(table.values)
    for spread in (read_duo_attention(path, heads=4), read_duo_attention(path, layout=LAYOUT)):
        assert spread.values[2].tolist() == [0.25, 0.25, 0.75, 0.75]
        assert spread.kv_heads == 2


def test_gates_come_back_as_written(tmp_path):
    gates = torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(0))
    scores = HeadScores("gates", gates.repeat_interleave(2, 2), kv_heads=2)
    path = write_duo_attention(scores, tmp_path / "out.tsv")
    assert torch.equal(read_duo_attention(path).per_prompt, gates)
    assert torch.equal(read_duo_attention(path, heads=4).per_prompt, scores.per_prompt)


def test_query_heads_become_kv_heads_only_by_name(tmp_path):
    scores = HeadScores("x", torch.tensor([[[0.0, 1.0, 0.5, 0.5]]]), kv_heads=2)
    with pytest.raises(ScoreError, match="differs within key-value groups"):
        write_duo_attention(scores, tmp_path / "out.tsv")
    with pytest.raises(ScoreError, match="'sum' is not known"):
        write_duo_attention(scores, tmp_path / "out.tsv", reduce="sum")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    path = write_duo_attention(scores, tmp_path / "max.tsv", reduce="max")
    assert read_duo_attention(path).values[0].tolist() == [1.0, 0.5]
    path = write_duo_attention(scores, tmp_path / "mean.tsv", reduce="mean")
    assert read_duo_attention(path).values[0].tolist() == [0.5, 0.5]


def test_unscored_heads_have_no_gate(tmp_path):
    with pytest.raises(ScoreError, match="without a score"):
        write_duo_attention(HeadScores("x", torch.full((1, 1, 1), NAN)), tmp_path / "out.tsv")


def test_a_ranked_list_keeps_its_order(tmp_path):
    path = tmp_path / "heads.yaml"
    path.write_text('# comment\nattn_head_set: "2-1, 0-3,1-0" # top3\nmodel_name_or_path: "org/model"\n')
    for scores in (read_qrhead(path), read_qrhead(path, LAYOUT)):
        assert scores.top(3) == [Head(2, 1), Head(0, 3), Head(1, 0)]
        assert scores.heads() == HeadSet.parse("L2H1 L0H3 L1H0")
        assert scores.settings["model"] == "org/model"
    path.write_text("attn_head_set: [2-1, 0-3]\n")
    assert read_qrhead(path).top(2) == [Head(2, 1), Head(0, 3)]


def test_all_heads_need_a_layout(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text("attn_head_set: full_heads\n")
    assert read_qrhead(path, LAYOUT).heads() == LAYOUT.all()
    with pytest.raises(ScoreError, match="layout"):
        read_qrhead(path)


def test_a_ranked_list_comes_back_as_written(tmp_path):
    scores = HeadScores("x", torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(0)))
    path = write_qrhead(scores, tmp_path / "out.yaml", top=5, model='org/model: "x"')
    assert read_qrhead(path, LAYOUT).top(5) == scores.top(5)
    stored = yaml.safe_load(path.read_text())
    assert stored["model_name_or_path"] == 'org/model: "x"'
    assert stored["attn_head_set"].count(",") == 4


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_retrieval_head, "", "is not JSON"),
        (read_retrieval_head, "{}", "names no heads"),
        (read_retrieval_head, "[1]", "names no heads"),
        (read_retrieval_head, '{"0-0": [', "is not JSON"),
        (read_retrieval_head, '{"0_0": [1]}', "names the head '0_0'"),
        (read_retrieval_head, '{"0-0": ["x"]}', "has 'x' among the scores"),
        (read_retrieval_head, '{"0-0": [Infinity]}', "has inf among"),
        (read_retrieval_head, '{"0-0": []}', "has no scores"),
        (read_retrieval_head, '{"0-0": [1], "00-0": [2]}', "names a head twice"),
        (read_retrieval_head, '{"99999999-9999999": [1]}', "more heads than any model has"),
        (read_duo_attention, "", "is no table"),
        (read_duo_attention, "1\t2\n3\n", r"rows of \[1, 2\] columns"),
        (read_duo_attention, "1\tx\n", "row 1 of .* is not numbers"),
        (read_duo_attention, "1\t2\n1\tnan\n", "row 2 of .* not finite"),
        (read_qrhead, "a: [", "is not YAML"),
        (read_qrhead, "- 1", 'has no "attn_head_set"'),
        (read_qrhead, "attn_head_set: 5", 'has no "attn_head_set"'),
        (read_qrhead, "attn_head_set: 1-2,x", "names the head 'x'"),
        (read_qrhead, "attn_head_set: [5]", "names the head 5"),
        (read_qrhead, 'attn_head_set: ","', "names no heads"),
        (read_qrhead, "attn_head_set: 1-2,1-2", "names a head twice"),
        (read_qrhead, "!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, read, content, message):
    path = tmp_path / "broken.file"
    path.write_text(content)
    with pytest.raises(ScoreError, match=message) as caught:
        read(path)
    assert "broken.file" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_retrieval_head, read_duo_attention, read_qrhead])
def test_missing_and_binary_files_are_refused(tmp_path, read):
    with pytest.raises(ScoreError, match="No such file"):
        read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScoreError, match="UTF-8"):
        read(tmp_path / "binary")


def test_files_of_another_model_are_refused(tmp_path):
    path = tmp_path / "a"
    path.write_text('{"3-0": [1]}')
    with pytest.raises(ScoreError, match=r"of another model: L3H0: layer 3 of a 3-layer model"):
        read_retrieval_head(path, LAYOUT)
    path.write_text("attn_head_set: 0-4")
    with pytest.raises(ScoreError, match="L0H4: head 4"):
        read_qrhead(path, LAYOUT)
    path.write_text("1\t2\t3\n")
    with pytest.raises(ScoreError, match="is 1x3, but the model has 3 layers of 2"):
        read_duo_attention(path, layout=LAYOUT)
    with pytest.raises(ScoreError, match="no multiple"):
        read_duo_attention(path, heads=4)


@pytest.mark.parametrize("write", [write_retrieval_head, write_duo_attention, write_qrhead])
def test_unwritable_paths_are_refused(tmp_path, write):
    with pytest.raises(ScoreError, match="cannot be written"):
        write(HeadScores("x", torch.ones(1, 1, 1)), tmp_path / "missing" / "out")

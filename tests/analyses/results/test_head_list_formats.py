import json
import math
import re
from pathlib import Path

import pytest
import scripts
import torch
import typer
import yaml

from interp.analyses.kv import CompressKV
from interp.analyses.results.head_list_formats import (
    read_compresskv,
    read_duo_attention,
    read_qrhead,
    read_retrieval_head,
    write_compresskv,
    write_duo_attention,
    write_qrhead,
    write_retrieval_head,
)
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet

LAYOUT = HeadLayout(3, 4, 2, 8)
NAN = math.nan
PUBLISHED = Path(__file__).resolve().parents[3] / "benchmarks" / "published.py"


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
    with pytest.raises(ScoreError, match="unknown reduce='sum'; choose"):
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


def test_each_layer_keeps_its_own_order(tmp_path):
    path = tmp_path / "model_head_idx.json"
    path.write_text('{"1": [3, 0], "0": [2, 3, 1, 0], "2": [1]}')
    for scores in (read_compresskv(path), read_compresskv(path, LAYOUT)):
        assert scores.values.tolist() == [[0.25, 0.5, 1.0, 0.75], [0.5, 0, 0, 1.0], [0, 1.0, 0, 0]]
        assert scores.heads() == HeadSet.parse("L0H0-L0H3 L1H0 L1H3 L2H1")
    assert read_compresskv(path, LAYOUT).kv_heads == 2
    assert HeadSet.parse(CompressKV.from_scores(scores, 0.4, n_voters=1).voters) == HeadSet.parse("L0H2 L1H3 L2H1")


def test_orders_come_back_as_written(tmp_path):
    scores = HeadScores("x", torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(0)), kv_heads=2)
    path = write_compresskv(scores, tmp_path / "out.json")
    back = read_compresskv(path, scores.layout)
    assert torch.equal(back.values.argsort(1), scores.values.argsort(1))
    assert json.loads(path.read_text())["2"] == scores.values[2].argsort(descending=True).tolist()
    assert write_compresskv(back, tmp_path / "again.json").read_text() == path.read_text()
    assert (
        CompressKV.from_scores(back, 0.4, n_voters=2).voters == CompressKV.from_scores(scores, 0.4, n_voters=2).voters
    )


def test_unscored_heads_have_no_place_in_an_order(tmp_path):
    with pytest.raises(ScoreError, match="without a score, which an order"):
        write_compresskv(HeadScores("x", torch.tensor([[[1.0, NAN]]])), tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


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
        (read_retrieval_head, f'{{"0-0": [{"9" * 5000}]}}', "is not JSON"),
        (read_retrieval_head, f'{{"0-0": [{"9" * 400}]}}', "has 9+.*9+ among"),
        (read_retrieval_head, '{"0-0": [1e39]}', r"has 1e\+39 among"),
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
        (read_compresskv, "", "is not JSON"),
        (read_compresskv, '{"0": [1', "is not JSON"),
        (read_compresskv, f'{{"0": [{"9" * 5000}]}}', "is not JSON"),
        (read_compresskv, "{}", "names no layers"),
        (read_compresskv, "[[1, 0]]", "names no layers"),
        (read_compresskv, '{"L0": [0]}', "names the layer 'L0'"),
        (read_compresskv, '{"-1": [0]}', "names the layer '-1'"),
        (read_compresskv, '{"9999999": [0]}', "names the layer '9999999'"),
        (read_compresskv, '{"0": [0], "00": [0]}', "names a layer twice"),
        (read_compresskv, '{"0": [0], "2": [0]}', "has no order for layer 1"),
        (read_compresskv, '{"1": [0]}', "has no order for layer 0"),
        (read_compresskv, '{"0": []}', r"has \[\] for layer 0"),
        (read_compresskv, '{"0": 3}', "has 3 for layer 0"),
        (read_compresskv, '{"0": ["1"]}', r"has \['1'\] for layer 0"),
        (read_compresskv, '{"0": [true]}', r"has \[True\] for layer 0"),
        (read_compresskv, '{"0": [1.0]}', r"has \[1.0\] for layer 0"),
        (read_compresskv, '{"0": [-1]}', r"has \[-1\] for layer 0"),
        (read_compresskv, '{"0": [0], "1": [2, 2]}', "names a head of layer 1 twice"),
        (read_compresskv, '{"0": [9999999]}', "more heads than any model has"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, read, content, message):
    path = tmp_path / "broken.file"
    path.write_text(content)
    with pytest.raises(ScoreError, match=message) as caught:
        read(path)
    assert "broken.file" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_retrieval_head, read_duo_attention, read_qrhead, read_compresskv])
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
    path.write_text('{"0": [0], "1": [4], "2": [0]}')
    with pytest.raises(ScoreError, match="L1H4: head 4"):
        read_compresskv(path, LAYOUT)
    path.write_text('{"0": [0], "1": [3]}')
    with pytest.raises(ScoreError, match="orders 2 layers of 3"):
        read_compresskv(path, LAYOUT)
    path.write_text("1\t2\t3\n")
    with pytest.raises(ScoreError, match="is 1x3, but the model has 3 layers of 2"):
        read_duo_attention(path, layout=LAYOUT)
    with pytest.raises(ScoreError, match="no multiple"):
        read_duo_attention(path, heads=4)


@pytest.mark.parametrize("write", [write_retrieval_head, write_duo_attention, write_qrhead, write_compresskv])
def test_unwritable_paths_are_refused(tmp_path, write):
    with pytest.raises(ScoreError, match="cannot be written"):
        write(HeadScores("x", torch.ones(1, 1, 1)), tmp_path / "missing" / "out")


def like_retrieval() -> str:
    """As many heads, instances and heads of each kind as the file of llama-2-7b-80k is known to have."""
    n, always = 586, {"16-19": 0.943, "11-15": 0.92, "8-26": 0.8}
    names = [f"{layer}-{head}" for layer in range(32) for head in range(32)]
    others = [name for name in names if name not in always]
    lists = {name: [value] * n for name, value in always.items()} | {name: [0.5] * n for name in others[:9]}
    lists |= {name: [0.0] + [0.3] * (n - 1) for name in others[9:30]}
    lists |= {name: [0.0] + [0.05] * (n - 1) for name in others[30:302]}
    return json.dumps(lists | {name: [0.0] * n for name in others[302:]})


def like_gates() -> str:
    """A table whose shares are those of Mistral-7B-Instruct-v0.2."""
    cells = ["0.0"] * 10 + ["0.3"] * 2 + ["0.7"] * 26 + ["0.998"] * 218
    return "".join("\t".join(cells[row : row + 8]) + "\n" for row in range(0, 256, 8))


def like_ranked() -> str:
    rest = ",".join(f"20-{head}" for head in range(11))
    return f'attn_head_set: "16-19,16-2,16-20,16-14,16-0,{rest}"\n'


def like_orders() -> str:
    draw = torch.Generator().manual_seed(0)
    return json.dumps({str(layer): torch.randperm(28, generator=draw).tolist() for layer in range(28)})


@pytest.mark.parametrize(
    ("path", "make", "old", "new", "complaint"),
    [
        ("head_score/llama-2-7b-80k.json", like_retrieval, "0.92", "0", "active in all others is 11, expected 12"),
        ("head_score/llama-2-7b-80k.json", like_retrieval, "0.3, ", "", "instances is 585, expected 586"),
        (
            "Mistral-7B-Instruct-v0.2/lr=0.02/full_attention_heads.tsv",
            like_gates,
            "0.3\t",
            "0.6\t",
            "at least 0.5 is 0.9570, expected 0.953",
        ),
        (
            "Qwen2.5-7B-Instruct_qr_head_NQ.yaml",
            like_ranked,
            "16-19,16-2,",
            "16-2,16-19,",
            "first heads is L16H2 L16H19",
        ),
        ("Qwen2.5-7B-Instruct_head_idx.json", like_orders, '"27"', '"28"', "no order for layer 27"),
    ],
)
def test_published_files_are_held_to_what_is_known(tmp_path, capsys, path, make, old, new, complaint):
    published = scripts.load(PUBLISHED)
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(make())
    published.main(tmp_path)
    assert re.search(r"1 files, [2-8] known figures, 0 complaints\n$", capsys.readouterr().out)
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(typer.Exit) as stop:
        published.main(tmp_path)
    assert stop.value.exit_code == 1
    assert complaint in capsys.readouterr().out


def test_files_of_which_nothing_is_known_are_shown(tmp_path, capsys):
    published = scripts.load(PUBLISHED)
    with pytest.raises(typer.Exit):
        published.main(tmp_path)
    assert "0 files" in capsys.readouterr().out
    (tmp_path / "full_attention_heads.tsv").write_text("0.25\t0.75\n")
    published.main(tmp_path)
    told = capsys.readouterr().out
    assert "| full_attention_heads.tsv | 1x2 / - | 0.5000 / - | 0.0000 / - | 0.0000 / - | 0.5000 / - |" in told


def test_heads_at_the_floor_are_in_no_exported_list(tmp_path):
    values = torch.zeros(1, 3, 4)
    values[0, 2, 1], values[0, 0, 3], values[0, 0, 0] = 0.9, 0.5, 0.7
    scores = HeadScores("x", values)
    path = write_qrhead(scores, tmp_path / "heads.yaml", top=10)
    assert yaml.safe_load(path.read_text())["attn_head_set"] == "2-1,0-0,0-3"
    with pytest.raises(ScoreError, match="ranks no head"):
        write_qrhead(HeadScores("x", torch.zeros(1, 3, 4)), tmp_path / "none.yaml")
    orders = json.loads(write_compresskv(scores, tmp_path / "heads.json").read_text())
    # a layer without a ranked head keeps all of its heads, since the format has no empty layer
    assert (orders["0"], orders["2"]) == ([0, 3], [1])
    assert sorted(orders["1"]) == [0, 1, 2, 3]
    assert json.loads(write_compresskv(scores, tmp_path / "again.json").read_text()) == orders
    back = read_compresskv(tmp_path / "heads.json", scores.layout)
    assert back.values[2].tolist() == [0.0, 1.0, 0.0, 0.0]

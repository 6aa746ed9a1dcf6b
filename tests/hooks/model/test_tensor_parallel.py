"""A model that tensor parallelism splits over processes: refused, since each process has other heads."""

import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = """
import os, sys, torch, interp
from interp import keep
from interp.errors import ModelError
from transformers import LlamaForCausalLM

how, folder = sys.argv[1:]
if how == "tp_plan":
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)
ids = torch.tensor([[5, 6, 7, 8]])
prompts = interp.Prompts.from_ids(ids.tolist())
edit = interp.steer.Pasta([(0, 2)], heads=[(0, 3)])
uses = {
    "capture": lambda: interp.capture(model, keep.entropy()),
    "ablate": lambda: interp.ablate(model, "L0H3", "zero"),
    "steer": lambda: interp.steering(model, edit, prompts),
}
for name, use in uses.items():
    try:
        with torch.no_grad(), use():
            model(ids)
        said = "nothing"
    except ModelError as error:
        said = str(error)
    os.write(1, f"RESULT {name} {said}\\n".encode())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tp_plan", "parallelize_module"])
def test_each_use_is_refused_in_both_processes(how, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), how, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(lines) == 6, done.stderr[-3000:]
    assert all("is split over 2 processes by tensor parallelism" in line for line in lines)

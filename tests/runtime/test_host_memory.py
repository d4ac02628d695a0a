"""The host never holds a second copy of the experts, and no more of them than it was told to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LOAD = """
import gc, json, re, sys
from pathlib import Path
import torch, transformers, moeflow
import moeflow.runtime.offload
transformers.logging.set_verbosity_error()
ids, found = torch.arange(3, 40)[None], []

def memory(which):
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

# the first time compiles and loads libraries
for given in ({"budget": "12 slots", "ram": "25MiB"}, {"budget": "12 slots", "ram": "64MiB"}, {"budget": "12 slots"}):
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = moeflow.offload(sys.argv[1], {"cache": {"evict": "lru", "scope": "global"}}, **given)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    found.append(memory("VmHWM") - before)
    del model
print(json.dumps(found))
"""


def test_peak_memory_of_loading_and_running(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 64, "hidden_size": 256, "intermediate_size": 64, "moe_intermediate_size": 512,
        "num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "decoder_sparse_step": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes))
    experts = 4 * 32 * 3 * 256 * 512 * 4
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    ran = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    _, on_disk, in_memory = json.loads(ran.stdout)
    assert on_disk < 64 * 2**20 + 20 * 2**20  # `ram`, and what a forward pass takes
    assert 0.9 * experts < in_memory < 1.3 * experts + 20 * 2**20  # and a few slots; a second copy would show

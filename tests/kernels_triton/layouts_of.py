"""Run in a process of its own, where Triton compiles: in which layouts the batch-invariant kernels multiply and reduce.

Prints, as JSON, of each shape and target the operations of decode and of prefill, in order.
"""

from __future__ import annotations

import json
import re

import torch
import triton

from kernels.ahead import TARGETS, source_of
from kernels.gpu.attention_ahead import DEVICES, compilations
from kernels.gpu.attention_plan import AttentionShape


def operations(ttgir: str) -> list[str]:
    """Products and reductions with the types of what they take and give, layouts written out."""
    layouts = dict(re.findall(r"^#(\w+) = (#ttg?\.?[^\n]*|#ttg[^\n]*)$", ttgir, re.MULTILINE))
    found = []
    for line in ttgir.splitlines():
        if re.search(r"= (tt\.dot|ttng\.warp_group_dot) ", line):
            found.append(line.partition(" : ")[2])
        elif re.match(r"\s*\}\) : \(", line):  # the end of a reduction
            found.append(line.strip())
    named = [re.sub(r" loc\(.*", "", text) for text in found]
    return sorted(re.sub(r"#(\w+)", lambda match: layouts.get(match[1], match[0]), text) for text in named)


def main() -> None:
    found = {}
    for heads, kv_heads, dim in ((32, 8, 128), (9, 3, 64)):
        for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            shape = AttentionShape(
                heads, kv_heads, dim, 16, torch.bfloat16, kv_dtype, dim**-0.5, 32768, batch_invariant=True
            )
            for device in DEVICES:
                target = next(target for target in TARGETS if target.name == device.kind)
                pair = []
                for ahead in list(compilations(shape, device, ""))[:2]:
                    options = {"num_warps": ahead.num_warps, "num_stages": ahead.num_stages, "enable_fp_fusion": False}
                    pair.append(operations(triton.compile(source_of(ahead), target.gpu, options).asm["ttgir"]))
                found[f"{heads} heads of {dim}, {kv_dtype}, {device.kind}"] = pair
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Run inside a peer's environment: `openvino_logits.py MODEL_DIRECTORY THREADS`, for benchmarks.readers.Program.

Out: int32 size of the vocabulary. In, again and again: int32 start, count, tokens[count]; out: float32 logits
[count, vocab]. A start of 0 forgets what was read before. Precisions are those that the plugin chooses by default.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov  # type: ignore[import-not-found]


def main() -> None:
    give = sys.stdout.buffer
    compiled = ov.Core().compile_model(
        Path(sys.argv[1]) / "openvino_model.xml",
        "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": int(sys.argv[2])},
    )
    names = {name for port in compiled.inputs for name in port.names}
    request = compiled.create_infer_request()
    give.write(np.int32(compiled.output("logits").partial_shape[2].get_length()).tobytes())
    give.flush()
    while head := sys.stdin.buffer.read(8):
        start, count = np.frombuffer(head, np.int32).tolist()
        tokens = np.frombuffer(sys.stdin.buffer.read(4 * count), np.int32).astype(np.int64)
        if start == 0:
            request.reset_state()
        inputs = {"input_ids": tokens[None], "attention_mask": np.ones((1, start + count), np.int64)}
        inputs |= {"position_ids": np.arange(start, start + count)[None], "beam_idx": np.zeros(1, np.int32)}
        request.infer({name: value for name, value in inputs.items() if name in names})
        give.write(np.ascontiguousarray(request.get_tensor("logits").data, np.float32).tobytes())
        give.flush()


if __name__ == "__main__":
    main()

"""Train a vector with the PyPI library `steering-vectors`, in an environment of its own (it needs transformers < 5).

Run by `test_baselines.py` as `python peer_steering_vectors.py MODEL_FOLDER SAMPLES.json VECTORS.safetensors`. A sample
is `[positive text, negative text, token index read in both]`, the index counted from the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from steering_vectors import SteeringVectorTrainingSample, train_steering_vector
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(folder: Path, samples: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    read = [SteeringVectorTrainingSample(a, b, i, i) for a, b, i in json.loads(samples.read_text(encoding="utf-8"))]
    vector = train_steering_vector(model, tok, read, batch_size=4)
    save_file({str(layer): v.contiguous() for layer, v in vector.layer_activations.items()}, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

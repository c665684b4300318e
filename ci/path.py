"""Compares what transformers make of an exported model with what Pillion has written: ci/path."""

import json
import sys
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQ = 128  # of `pillion train`


def main(out, prompt):
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    theirs = tokenizer.decode(written, skip_special_tokens=True)
    ours = (out / "text").read_text().removesuffix("\n")
    assert ours == theirs, f"Pillion writes {ours!r}, transformers {theirs!r}"

    tokens = numpy.fromfile(out / "tokens" / "validation-00000.tokens", dtype=numpy.uint16).astype(numpy.int64)
    windows = (len(tokens) - 1) // SEQ
    loss = 0.0
    with torch.no_grad():
        for start in range(0, windows * SEQ, SEQ):
            window = torch.tensor(tokens[start : start + SEQ + 1])
            logits = model(window[None, :-1]).logits[0]
            loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    loss /= windows * SEQ
    found = json.loads((out / "loss").read_text())["loss"]
    # Both are f32 with sums in other orders.
    assert abs(found - loss) < 1e-5 * loss, f"a loss of {found} in Pillion, {loss} in transformers"
    print(f"the same text in both: {ours!r}; loss {found:.6f} and {loss:.6f}")


main(Path(sys.argv[1]), sys.argv[2])

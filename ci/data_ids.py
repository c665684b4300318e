"""Compares the tokens of `pillion tokenize` with those of the package `tokenizers` (ci/data)."""

import json
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

import numpy
import tokenizers

program, tokenizer_file, corpus = sys.argv[1:]

# Documents of about 10 KB: the corpus as it is, and without the tags of words.
texts = []
for path in sorted(pathlib.Path(corpus).glob("c[a-r][0-9][0-9]")):
    tagged = path.read_text(encoding="utf-8", errors="strict")
    for text in (tagged, re.sub(r"(\S+)/\S+", r"\1", tagged)):
        texts += [text[at : at + 10_000] for at in range(0, len(text), 10_000)]
# What tokenizers treat in a way of their own.
texts += ["</s> a <s>b", "  two  spaces \n\n\t", "naïve 漢字 🙂 \u0000", "x", "<0x41>", "\u2581\u2581a"]


def peak_memory(pid):
    """The most memory that a process has had so far, in KiB."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status)
    # Until it runs the program, it is a copy of this process.
    is_program = "Name:\tpillion\n" in status
    return int(found[1]) if found and is_program else 0


def tokenize(folder, lines):
    source = folder / "data.jsonl"
    source.write_text("".join(lines))
    out = folder / "out"
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [program, "tokenize", source, "--tokenizer", tokenizer_file, "--out", out, "--validation", "0"]
    process = subprocess.Popen([*command, "--restart", "--threads", "1"], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, peak_memory(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    megabytes = source.stat().st_size / 1e6
    print(f"{megabytes:.0f} MB: {megabytes / seconds:.1f} MB a second of processor time,")
    print(f"  {megabytes / (time.monotonic() - began):.1f} MB a second, at most {most // 1024} MiB of memory")
    return out, most


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    out, small = tokenize(folder, lines)
    index = json.loads((out / "index.json").read_text())
    ids, ends = [], []
    for shard in index["train"]["shards"]:
        width = {2: "<u2", 4: "<u4"}[index["token_bytes"]]
        ends.append(sum(map(len, ids)) + numpy.fromfile(out / f"{shard['name']}.documents", "<u8"))
        ids.append(numpy.fromfile(out / f"{shard['name']}.tokens", width))
    ids, ends = numpy.concatenate(ids), numpy.concatenate(ends)
    documents = numpy.split(ids, ends[:-1].astype(int))
    reference = tokenizers.Tokenizer.from_file(tokenizer_file)
    assert len(documents) == len(texts) and ends[-1] == len(ids)
    for text, found, encoding in zip(texts, documents, reference.encode_batch(texts, add_special_tokens=False)):
        expected = [*encoding.ids, index["separator"]]
        # A text that ends with the separator gets no second one.
        expected = expected[:-1] if encoding.ids[-1:] == [index["separator"]] else expected
        assert found.tolist() == expected, (text[:200], found.tolist()[:50], expected[:50])
    print(f"{len(ids)} tokens of {len(texts)} documents: all ids are the same")

    _, large = tokenize(folder, lines * 8)
    assert large < 1.3 * small, f"memory grows with the text: {small} KiB, then {large} KiB"

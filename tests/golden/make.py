"""Makes the golden files: Hugging Face's Llama and PyTorch's AdamW on inputs small enough to commit.

    python3 -m venv venv && venv/bin/pip install -r tests/golden/requirements.txt
    venv/bin/python tests/golden/make.py [FOLDER]

Made with Python 3.11.7 and the versions in requirements.txt, on an x86-64 CPU. FOLDER defaults to that of this
script. Two runs on one machine give equal bytes; another CPU or another version of PyTorch may differ in the last
bits, because its matrix products add in another order.

Every tensor comes from an f32 run. The same weights are also run in f64, and each file's metadata says how far f32
lies from it ("distance"): a correct f32 implementation lies about as far, so tolerances follow from it. The forward and
backward passes are also run in bf16, with the weights rounded to it, and the metadata says how far that lies from
f64 with the same rounded weights ("bf16_distance").

losses.safetensors is of another kind: the losses of 50 steps in f64, and how far three f32 runs lie from them whose
sums differ in order. A correct f32 implementation adds in a fourth order, and should lie about as far.
"""

import copy
import json
import math
import platform
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy
import safetensors
import safetensors.torch
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

WEIGHT_STD = 0.2  # wide enough that attention is far from uniform, so its gradients are not small
NORM_STD = 0.1
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, MAX_NORM, STEPS = 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0, 3

# Of the 50 steps: a linear warm-up, then a cosine down to a share of the peak, as `pillion train` has them. The batches
# take turns, so that the losses fall.
LONG_STEPS, LONG_BATCHES, PEAK, WARMUP, FINAL = 50, 5, 1e-2, 0.1, 0.1
# Which sequences of a batch of four are back-propagated together, and in which order.
ORDERS = {"together": [[0, 1, 2, 3]], "in turn": [[0], [1], [2], [3]], "from the last": [[3], [2], [1], [0]]}

# The keys are those of a Hugging Face config.json.
COMMON = dict(
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    max_position_embeddings=64,
)
ROPE_THETA = 10000.0
MHA = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    **COMMON,
)
GQA = dict(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    **COMMON,
)
# What relatives of Llama 2 have: a head that is the embedding, heads of a width of their own, and Llama 3.1's scaling,
# whose three ranges of wavelengths all occur in so few tokens.
RELATIVE = dict(
    vocab_size=53,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    **{**COMMON, "tie_word_embeddings": True},
)
SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}


def main(folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    mha, gqa = build(MHA, seed=1), build(GQA, seed=2)
    write_forward_backward(folder / "mha.safetensors", MHA, mha, random_batch(MHA, batch=3, sequence=19, seed=11))
    write_forward_backward(folder / "gqa.safetensors", GQA, gqa, random_batch(GQA, batch=2, sequence=33, seed=12))
    relative = build(RELATIVE, seed=3, scaling=SCALING)
    batch = random_batch(RELATIVE, batch=2, sequence=40, seed=13)
    write_forward_backward(folder / "relative.safetensors", {**RELATIVE, "rope_scaling": SCALING}, relative, batch)
    batches = [random_batch(MHA, batch=3, sequence=19, seed=21 + step) for step in range(STEPS)]
    write_adamw(folder / "adamw.safetensors", MHA, mha, batches)
    batches = [random_batch(MHA, batch=4, sequence=16, seed=31 + number) for number in range(LONG_BATCHES)]
    write_losses(folder / "losses.safetensors", MHA, mha, batches)


def build(config, seed, scaling={"rope_type": "default"}):
    """An f32 model: matrices normal(0, WEIGHT_STD), norm weights 1 + normal(0, NORM_STD)."""
    rope = {**scaling, "rope_theta": ROPE_THETA}
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope, attn_implementation="eager")).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * WEIGHT_STD if parameter.dim() == 2 else 1 + noise * NORM_STD)
    return model


def random_batch(config, batch, sequence, seed):
    """tokens and targets, each [B, T]: the targets are the tokens one place on, so none is missing at the end."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config["vocab_size"], (batch, sequence + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class AllFloat64(TorchFunctionMode):
    """Turns every f32 that code asks for into f64.

    model.double() is not enough: Hugging Face's RMSNorm, softmax and rotary angles go through f32 whatever the
    weights are.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        return function(*map(widen, args), **kwargs)


def in_float64(model):
    """A copy with the same weights in f64, and rotary frequencies computed in f64 rather than widened."""
    wide = copy.deepcopy(model).double()
    dim = wide.config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wide.model.rotary_emb.inv_freq.copy_(scaled(ROPE_THETA**-exponents, wide.config.rope_parameters))
    return wide


def scaled(frequencies, rope):
    """Llama 3.1's frequencies: high ones stay, low ones are divided, those between are interpolated."""
    if rope["rope_type"] == "default":
        return frequencies
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def forward_backward(model, tokens, targets):
    """Fills the model's gradients. Returns logits, loss and the hidden states after each layer, before the last norm.

    The loss is the mean cross-entropy over all B*T targets.
    """
    hidden = []

    def keep(layer, inputs, output):
        hidden.append(output)

    # Hooks, since output_hidden_states gives the last layer's states after the final norm.
    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    model.zero_grad()
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    return logits, loss, hidden


def forward_backward_results(model, tokens, targets):
    logits, loss, hidden = forward_backward(model, tokens, targets)
    results = {"logits": logits, "loss": loss}
    results |= {f"hidden.{layer}": state for layer, state in enumerate(hidden)}
    results |= {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return results


def write_forward_backward(path, config, model, batch):
    tokens, targets = batch
    results = forward_backward_results(model, tokens, targets)
    with AllFloat64():
        exact = forward_backward_results(in_float64(model), tokens, targets)
    rounded_weights = copy.deepcopy(model).bfloat16()
    narrow = forward_backward_results(rounded_weights, tokens, targets)
    with AllFloat64():
        of_rounded = forward_backward_results(in_float64(rounded_weights.float()), tokens, targets)
    bf16_distance = {name: distance(narrow[name], of_rounded[name]) for name in narrow}
    inputs = {f"param.{name}": parameter for name, parameter in model.named_parameters()}
    inputs |= {"tokens": tokens, "targets": targets, "loss.f64": exact["loss"]}
    write(path, config, inputs, results, exact, {"bf16_distance": json.dumps(bf16_distance)})


def adamw(model):
    """AdamW over the model's parameters, which decays its matrices."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        foreach=False,
    )


def adamw_results(model, batches, wide):
    """STEPS updates. loss.<step> and norm.<step> are from before that step's update and before clipping."""
    parameters = list(model.parameters())
    optimizer = adamw(model)
    results = {}
    for step, (tokens, targets) in enumerate(batches):
        if wide:
            with AllFloat64():
                _, loss, _ = forward_backward(model, tokens, targets)
        else:
            _, loss, _ = forward_backward(model, tokens, targets)
        results[f"loss.{step}"] = loss
        results[f"norm.{step}"] = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
    for name, parameter in model.named_parameters():
        results[f"param.{name}"] = parameter
        results[f"exp_avg.{name}"] = optimizer.state[parameter]["exp_avg"]
        results[f"exp_avg_sq.{name}"] = optimizer.state[parameter]["exp_avg_sq"]
    return results


def write_adamw(path, config, model, batches):
    exact = adamw_results(in_float64(model), batches, wide=True)
    results = adamw_results(copy.deepcopy(model), batches, wide=False)
    inputs = {}
    for step, (tokens, targets) in enumerate(batches):
        inputs |= {f"tokens.{step}": tokens, f"targets.{step}": targets}
    settings = {"lr": LEARNING_RATE, **optimizer_settings(), "steps": STEPS}
    write(path, config, inputs, results, exact, {"optimizer": json.dumps(settings)})


def optimizer_settings():
    return {
        "betas": BETAS,
        "eps": EPSILON,
        "weight_decay_matrices": WEIGHT_DECAY,
        "weight_decay_vectors": 0.0,
        "max_norm": MAX_NORM,
    }


def learning_rate(step):
    """Of a step, counted from 0."""
    done = (step + 1) / LONG_STEPS
    if done < WARMUP:
        return PEAK * done / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))
    return PEAK * (FINAL + (1 - FINAL) * cosine)


def losses(model, batches, order, wide):
    """Losses before each of LONG_STEPS updates: the mean over a batch's targets, whose gradient is summed in `order`."""
    optimizer = adamw(model)
    found = []
    for step in range(LONG_STEPS):
        tokens, targets = batches[step % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        total = 0.0
        for rows in order:
            with AllFloat64() if wide else nullcontext():
                logits = model(input_ids=tokens[rows], use_cache=False).logits
                assert logits.dtype == (torch.float64 if wide else torch.float32)
                of_rows = cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum")
                loss = of_rows / targets.numel()
                loss.backward()
            total += loss.item()
        found.append(total)
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), MAX_NORM)
        optimizer.step()
    return torch.tensor(found, dtype=torch.float64)


def write_losses(path, config, model, batches):
    """The f64 losses, the rates, the batches, and the largest |f32 loss - f64 loss| of each f32 run over all steps."""
    exact = losses(in_float64(model), batches, ORDERS["together"], wide=True)
    deviations = {}
    for name, order in ORDERS.items():
        deviations[name] = (losses(copy.deepcopy(model), batches, order, wide=False) - exact).abs().max().item()
    rates = torch.tensor([learning_rate(step) for step in range(LONG_STEPS)], dtype=torch.float64)
    tensors = {"loss.f64": exact, "lr": rates}
    for number, (tokens, targets) in enumerate(batches):
        tensors |= {f"tokens.{number}": tokens, f"targets.{number}": targets}
    settings = {**optimizer_settings(), "peak": PEAK, "warmup": WARMUP, "final": FINAL, "steps": LONG_STEPS}
    more = {"optimizer": json.dumps(settings), "deviation": json.dumps(deviations)}
    save(path, config, tensors, more)
    print(f"  from {exact[0]:.4f} to {exact[-1]:.4f}, deviations", *(f"{value:.1e}" for value in deviations.values()))


def distance(result, exact):
    """How far a result lies from its exact value.

    max_abs: the largest difference; relative: that over the largest |exact|; rms: the difference's rms over exact's.
    """
    difference, exact = (result.double() - exact).detach(), exact.detach()
    return {
        "max_abs": rounded(difference.abs().max()),
        "relative": rounded(difference.abs().max() / exact.abs().max()),
        "rms": rounded(difference.norm() / exact.norm()),
    }


def rounded(value):
    return float(f"{value.item():.2e}")


def write(path, config, inputs, results, exact, more_metadata):
    """Writes inputs and results, and in the metadata how far each result lies from its exact value."""
    assert results.keys() == exact.keys()
    assert all(value.dtype == torch.float32 for value in results.values()), "the f32 run is f32 throughout"
    assert all(value.dtype == torch.float64 for value in exact.values()), "the f64 run is f64 throughout"
    more = {"distance": json.dumps({name: distance(results[name], exact[name]) for name in results}), **more_metadata}
    save(path, config, inputs | results, more)
    report(results, exact)


def save(path, config, tensors, more_metadata):
    """Writes tensors, with the model's shape and the versions in the metadata."""
    metadata = {
        "config": json.dumps({"model_type": "llama", **config, "rope_theta": ROPE_THETA}),
        "versions": json.dumps(
            {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
                "numpy": numpy.__version__,
            }
        ),
        **more_metadata,
    }
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    path.write_bytes(with_sorted_metadata(safetensors.torch.save(tensors, metadata)))
    print(f"{path.name}: {path.stat().st_size} bytes")


def with_sorted_metadata(file):
    """The same safetensors file with its metadata in order: the library writes it in a random one."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensor data to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[start:]


def report(results, exact):
    """Prints the size (rms) of each result and its distance, worst of each kind."""
    kinds = {}
    for name in results:
        kinds.setdefault(name.split(".")[0], []).append(name)
    for kind, names in kinds.items():
        smallest = min(exact[name].detach().square().mean().sqrt().item() for name in names)
        distances = [distance(results[name], exact[name]) for name in names]
        worst = {key: max(each[key] for each in distances) for key in distances[0]}
        print(f"  {kind:12} rms at least {smallest:.1e}, distance at most", *(f"{k} {v:.1e}" for k, v in worst.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

"""Reading prompts and writing answers on a GPU by a mixture of eight experts of a model's shape.

Our two routers, of top-2 over eight experts of FFN in bfloat16, and stock transformers' FlexOlmo
of the same shape. Weights are random, and drawn on the GPU.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import shapes
import torch
from gpu_models import draw, make_anchor, synchronise
from torch import Tensor

from flexolmo.inference.reader import OwnReader, spread
from flexolmo.model.assemble import expert_tensors, frame_mixture, weigh_table
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import EvidenceRouter, RouterSettings
from flexolmo.model.shape import expert_shapes
from flexolmo.model.statistics import EvidenceSettings

TOP_K = 2
PREFILL = {"1B": (4, 512), "tiny": (2, 16)}
PROMPT_TOKENS = {"1B": 128, "tiny": 8}
WRITE_BATCHES = (1, 16)
NEW_TOKENS = 16
ROUNDS = 5

Read = Callable[[Tensor, Any], Tensor]  # logits [B,V] after ids [B,T], which go on from a state


def make_mixture(size: str, device: torch.device, router: RouterSettings) -> MixtureModel:
    """A mixture on the device in bfloat16, whose tables are fitted to texts."""
    anchor = make_anchor(size, str(device), torch.bfloat16)
    config = anchor.config
    dims = {}
    is_evidence = isinstance(router, EvidenceSettings)
    for domain, name in enumerate(shapes.owner_names(), start=1):
        shape = shapes.expert_shape(config, "ffn")
        if is_evidence:
            pairs = len(shapes.owner_table(config.vocab_size, domain).keys)
            shape = shape.model_copy(update={"num_bigrams": pairs})
        dims[name] = expert_shapes(config, shape, router)
    model = frame_mixture(anchor, dims, router, top_k=TOP_K)
    for domain, name in enumerate(dims, start=1):
        for key, tensor in expert_tensors(model, name).items():
            if not key.startswith("router."):
                tensor.data.normal_(0, 0.02)
        if is_evidence:
            assert isinstance(model.router, EvidenceRouter)
            model.router.table(name).fill(shapes.owner_table(config.vocab_size, domain))
            weigh_table(model, anchor, name)
    return model


def own_reading(
    size: str, device: torch.device, router: RouterSettings
) -> tuple[Read, Callable[[int], Any]]:
    """Our reader, and its states for a batch."""
    model = make_mixture(size, device, router)
    reader = OwnReader(model, make_anchor(size, str(device), torch.bfloat16).tokenizer)
    return (
        lambda ids, state: reader.read(ids, state, last=1)[:, -1],
        lambda batch: spread(reader.new_state(), batch),
    )


def stock_reading(size: str, device: torch.device) -> tuple[Read, Callable[[int], Any]]:
    """Stock's model, and its caches."""
    from transformers import DynamicCache, FlexOlmoConfig, FlexOlmoForCausalLM

    s = shapes.SIZES[size]
    config = FlexOlmoConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.d_model,
        intermediate_size=s.d_ff,
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        num_key_value_heads=s.num_heads,
        num_experts=shapes.NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        pad_token_id=None,
        eos_token_id=shapes.EOS,
    )
    with torch.device("meta"):
        stock = FlexOlmoForCausalLM(config)
    stock = stock.to(torch.bfloat16).to_empty(device=device).eval()
    draw(stock)
    with torch.no_grad():
        for p in stock.parameters():
            if p.dim() > 2:  # experts in one tensor
                p.normal_(0, 0.02)
        rotary = stock.model.rotary_emb
        exponents = torch.arange(0, s.d_model // s.num_heads, 2, device=device).float()
        rotary.inv_freq.copy_(1 / 500_000 ** (exponents * s.num_heads / s.d_model))
    return (
        lambda ids, cache: stock(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1],
        lambda batch: DynamicCache(config=config),
    )


def writing(read: Read, prompt: Tensor, state: Any) -> Iterator[Callable[[], None]]:
    """Work of each step in which every text gets its likeliest token; `prompt` [B,T]."""
    token = read(prompt, state).argmax(-1, keepdim=True)  # [B,1]

    def write() -> None:
        nonlocal token
        token = read(token, state).argmax(-1, keepdim=True)
        token.tolist()

    for _ in range(NEW_TOKENS):
        yield write


def time_reading(
    size: str, device: torch.device, read: Read, new_state: Callable[[int], Any], end: float
) -> dict[str, Any]:
    """Milliseconds of reading prompts, and of writing a token a text."""
    is_gpu = device.type == "cuda"
    found: dict[str, Any] = {}

    def timed(work: Callable[[], object]) -> float:
        synchronise(is_gpu)
        start = time.perf_counter()
        work()
        synchronise(is_gpu)
        return 1000 * (time.perf_counter() - start)

    with torch.inference_mode():
        B, T = PREFILL[size]
        ids = shapes.made_texts(size, B, T).to(device)
        taken = [timed(lambda: read(ids, new_state(B))) for _ in range(ROUNDS + 1)]
        found[f"prefill {B}x{T} ms"] = statistics.median(taken[1:])
        for batch in WRITE_BATCHES:
            if time.monotonic() > end:
                break
            prompt = shapes.made_texts(size, batch, PROMPT_TOKENS[size]).to(device)
            steps = [timed(write) for write in writing(read, prompt, new_state(batch))]
            found[f"decode {batch} ms a token"] = statistics.median(steps[3:])
    return found


def measure(size: str, device: torch.device, end: float) -> dict[str, Any]:
    """Figures of our linear and evidence routers, and of stock, each while time is left."""
    kinds: dict[str, Callable[[], tuple[Read, Callable[[int], Any]]]] = {
        "linear": lambda: own_reading(size, device, shapes.LINEAR),
        "evidence": lambda: own_reading(size, device, EvidenceSettings(min_weight=0.0)),
        "stock": lambda: stock_reading(size, device),
    }
    found: dict[str, Any] = {}
    for kind, make in kinds.items():
        if time.monotonic() > end:
            break
        try:
            found[kind] = time_reading(size, device, *make(), end)
        except Exception as e:
            found[kind] = {"error": f"{type(e).__name__}: {e}"[:400]}
        print(f"  {kind}: {found[kind]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found

"""A step of training, counted without being run: products, bytes and memory.

The very program that trains runs here on tensors that have shapes and no numbers (torch's fake
tensors), so nothing is computed, no memory is taken, and what is counted changes with the program.
Knows nothing of machines, time or money.

B batch, H heads, T positions, C numbers of a head, N = B*T, n positions at which the anchor is read
beside the expert, L layers, W processes.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexolmo.errors import ConfigError
from flexolmo.model.blend import Blend, alone
from flexolmo.model.deltas import Share
from flexolmo.model.loss import language_model_loss, loss_chunk
from flexolmo.model.moe import MixtureModel
from flexolmo.model.parallel import place, refuse_uneven
from flexolmo.model.router import DiscriminantSettings, EvidenceRouter, LinearRouter
from flexolmo.model.stock import DTYPES, DtypeName
from flexolmo.model.transformer import ForwardContext, ModelConfig, Transformer
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, expert_loss, trainable_parameters
from flexolmo.train.loop import build_optimizers
from flexolmo.train.muon import Muon

# Part of an owner's text at which the evidence router weighs the anchor beside the expert; as
# benchmarks/training.py finds it.
PUBLIC_SHARE = 0.2
COUNTED_LAYERS = (2, 3)  # of a deeper model, whose every count is linear in its layers
_NAME = "expert"
_ATEN = torch.ops.aten
# Operations that read few of the numbers they are given: what they write counts, twice.
_SPARSE = {_ATEN.embedding.default, _ATEN.gather.default, _ATEN.index_select.default}


@dataclass(frozen=True)
class Work:
    """Work of some operations."""

    float32_flops: float = 0.0  # of matrix products and attention, by precision
    bfloat16_flops: float = 0.0
    moved_bytes: float = 0.0  # read and written by every other operation

    @property
    def flops(self) -> float:
        return self.float32_flops + self.bfloat16_flops

    def __add__(self, other: "Work") -> "Work":
        return _combine(self, other, lambda a, b: a + b)


@dataclass(frozen=True)
class StepCount:
    """Counts of a step in one of W processes.

    Memory is of tensors, in bytes; the optimizer's work, and what is kept between steps, are those
    of all W together.
    """

    part: Work  # reading one part of the batch, and its gradient
    update: Work  # clipping, and the optimizer
    weight_bytes: float  # parameters and buffers
    learnt_bytes: float  # of them, those that learn
    state_bytes: float  # kept by the optimizer
    part_peak_bytes: float  # highest beside these, while a part of the batch is read
    update_peak_bytes: float  # the same in the update, gradients included
    block_bytes: float  # parameters of one block
    block_learnt_bytes: float  # of them, those that learn
    root_bytes: float  # parameters outside blocks and embedding


def _combine(a: Any, b: Any, join: Callable[[float, float], float]) -> Any:
    """`join` of every number in two counts of one kind."""
    found = {}
    for f in fields(a):
        one = getattr(a, f.name)
        other = getattr(b, f.name)
        nested = isinstance(one, Work)
        found[f.name] = _combine(one, other, join) if nested else join(one, other)
    return type(a)(**found)


class _Counter(TorchDispatchMode):
    """Adds up the work of every operation, and the memory that is alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self.alive_bytes = self.peak_bytes = 0.0
        self._sizes: dict[int, float] = {}
        self._refs: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not func.is_view and made:
            self._add(func, given, made)
        for t in made:
            self._keep(t)
        return out

    def _add(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        if flops := _flops_of(func, given, made):
            is_half = made[0].dtype == torch.bfloat16
            more = Work(bfloat16_flops=flops) if is_half else Work(float32_flops=flops)
        else:
            read = made if func in _SPARSE else given
            more = Work(moved_bytes=float(sum(t.nbytes for t in (*read, *made))))
        self.work = self.work + more

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return

        def free(_: Any) -> None:
            del self._refs[key]
            self.alive_bytes -= self._sizes.pop(key)

        self._sizes[key] = float(storage.nbytes())
        self._refs[key] = weakref.ref(storage, free)
        self.alive_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    def shrink(self, tensor: Tensor, size: int) -> None:
        """Count a tensor as cut into `size` parts, of which one is kept."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes:
            left = tensor.nbytes / size
            self.alive_bytes -= self._sizes[key] - left
            self._sizes[key] = left

    def take(self) -> tuple[Work, float]:
        """Work and highest memory since the last call."""
        work = self.work
        peak_bytes = self.peak_bytes
        self.work = Work()
        self.peak_bytes = self.alive_bytes
        return work, peak_bytes


def _flops_of(func: Any, given: list[Tensor], made: list[Tensor]) -> float:
    """FLOPs of a matrix product, or of attention over what lies before; 0 for all else."""
    if func in (_ATEN.mm.default, _ATEN.bmm.default):
        return 2.0 * given[0].numel() * given[1].shape[-1]
    if func in (_ATEN.addmm.default, _ATEN.addmm_.default, _ATEN.baddbmm.default):
        return 2.0 * given[1].numel() * given[2].shape[-1]
    name = func.name()
    if name == "mkldnn::_linear_pointwise":
        return 2.0 * given[0].numel() * given[1].shape[0]
    if "scaled_dot_product" not in name:
        return 0.0
    is_backward = "backward" in name
    query = given[1] if is_backward else given[0]  # [B,H,T,C]
    B, H, T, C = query.shape
    num_products = 5 if is_backward else 2
    return num_products * B * H * T * T * C  # of 2*T*T*C, over the half of places that lie before


class _CountedMixture(MixtureModel):
    """A mixture of one expert whose evidence router, which would look at the text, is told."""

    def _context(self, ids: Tensor, *options: Any, **named: Any) -> ForwardContext:
        if self.router is None:
            return super()._context(ids, *options, **named)
        ctx = Transformer._context(self, ids, *options, **named)
        N = ids.numel()
        weight = torch.ones(N, 1, dtype=ctx.dtype, device=ids.device)
        ctx.weights = weight.expand(N, 2).view(*ids.shape, 2)
        ctx.shares = [None, Share(weight, N)]
        ctx.rests = {(1,): None}
        ctx.blend = alone(N, ctx.dtype, ids.device)
        if not self.trains_alone:
            rows = torch.arange(math.ceil(PUBLIC_SHARE * N), device=ids.device)  # [n]
            ctx.blend = Blend(weight, None, weight[: len(rows)], rows)
        return ctx


def count_step(
    config: ModelConfig,
    recipe: AnchorRecipe | ExpertRecipe,
    processes: int = 1,
    dtype: DtypeName = "float32",
    muon_dtype: torch.dtype | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> StepCount:
    """Counts of a step of `recipe` in one of `processes` on such a device, for an anchor of this
    `config`, whose weights are in `dtype`; Muon's products are in `muon_dtype` (none: as on this
    machine).

    Raises ConfigError for what is not counted: private training, the discriminant router, a batch
    that the processes cannot share.
    """
    settings = recipe.train
    refuse_uneven(settings.batch_size, settings.accumulate, processes)
    config.refuse_longer(settings.seq_len, "train.seq_len")
    _refuse_uncounted(recipe)
    config = config.model_copy(update={"document_mask": False})  # it looks at the text

    def at(num_layers: int) -> StepCount:
        shallow = config.model_copy(update={"num_layers": num_layers})
        with FakeTensorMode():
            program = StepProgram(shallow, recipe, dtype, loss_chunk(config.vocab_size, device))
            for optimizer in program.optimizers:
                if isinstance(optimizer, Muon):
                    optimizer.dtype = muon_dtype
            return _count(program, processes)

    few, more = COUNTED_LAYERS
    if config.num_layers <= more:
        return at(config.num_layers)
    low = at(few)
    high = at(more)
    steps = (config.num_layers - few) / (more - few)
    found: StepCount = _combine(low, high, lambda a, b: a + steps * (b - a))
    return found


def _refuse_uncounted(recipe: AnchorRecipe | ExpertRecipe) -> None:
    if isinstance(recipe, AnchorRecipe):
        return
    instead = "use flexolmo expert train --plan, which times a few steps on your text."
    if recipe.privacy is not None:
        raise ConfigError(f"A private step's work depends on the text: {instead}")
    if isinstance(recipe.router, DiscriminantSettings):
        raise ConfigError(f"The discriminant router's work depends on the text: {instead}")


class StepProgram:
    """A step of training on made-up text, to be counted or timed; weights mean nothing."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: AnchorRecipe | ExpertRecipe,
        dtype: DtypeName = "float32",
        chunk: int | None = None,
    ):
        """`dtype` is that of the anchor's weights, `chunk` as in `language_model_loss`."""
        self.settings = recipe.train.model_copy(update={"compile": "off"})
        self.loss_of: Callable[[Tensor], Tensor]
        like = torch.empty(0, dtype=DTYPES[dtype])
        if isinstance(recipe, AnchorRecipe):
            self.model = Transformer(config)
            place(self.model, like)
            self.parameters = dict(self.model.named_parameters())
            self.loss_of = partial(language_model_loss, self.model, chunk=chunk)
        else:
            pair = _CountedMixture(config, {_NAME: recipe.shape(config)}, recipe.router)
            self.model = pair
            pair.trains_alone = recipe.is_alone
            place(pair, like)
            for module in pair.modules():
                if isinstance(module, LinearRouter | EvidenceRouter):
                    place(module, torch.empty(0))  # in float32 always
            pair.requires_grad_(False)
            self.parameters = trainable_parameters(pair, _NAME)
            self.loss_of = expert_loss(pair, recipe, chunk)
        for p in self.parameters.values():
            p.requires_grad_(True)
        arrange_blocks(self.model.train(), self.settings, "")
        self.optimizers = [o for o, _ in build_optimizers(self.parameters, self.settings)]

    def read(self, rows: int) -> None:
        """Add to the gradient what one part of the batch, of `rows` sequences, gives."""
        ids = torch.zeros(rows, self.settings.seq_len + 1, dtype=torch.long)
        is_half = self.settings.precision == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=is_half):
            loss = self.loss_of(ids) / self.settings.accumulate
        loss.backward()

    def update(self) -> None:
        """Clip and move, as `loop.train` does."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.grad_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _count(program: StepProgram, processes: int) -> StepCount:
    settings, model = program.settings, program.model
    rows = settings.batch_size // (processes * settings.accumulate)
    parameters = program.parameters.values()
    for p in parameters:  # a first step, by which the optimizers get their state
        p.grad = torch.zeros_like(p)
    program.update()
    counter = _Counter()

    def cut(p: Tensor) -> None:
        if p.grad is not None:
            counter.shrink(p.grad, processes)

    for p in parameters:
        p.register_post_accumulate_grad_hook(cut)
    with counter, _young_garbage():
        for _ in range(min(settings.accumulate, 2)):  # the second finds gradients there
            counter.work = Work()
            program.read(rows)
        gc.collect(0)
        part, part_peak = counter.take()
        program.update()
        update, update_peak = counter.take()
    block = model.layers[0]
    states = [t for o in program.optimizers for s in o.state.values() for t in s.values()]
    return StepCount(
        part,
        update,
        weight_bytes=_size([*model.parameters(), *model.buffers()]),
        learnt_bytes=_size(parameters),
        state_bytes=_size(states),
        part_peak_bytes=part_peak,
        update_peak_bytes=update_peak,
        block_bytes=_size(block.parameters()),
        block_learnt_bytes=_size(p for p in block.parameters() if p.requires_grad),
        root_bytes=_size([model.norm.weight, *model.lm_head.parameters()]),
    )


@contextmanager
def _young_garbage() -> Iterator[None]:
    """Within, what is made stays in the youngest generation: a collection of that alone finds all
    garbage since, without looking through all that the process has ever made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _size(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.nbytes for t in tensors))

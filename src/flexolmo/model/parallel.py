"""Training by several processes that torchrun started: what each of them holds, reads and says.

The one file that knows of processes; elsewhere a model is a model and a tensor a tensor, and
everything here is a plain answer where there is one process. Each process holds a part of the rows
of every matrix, of its gradient and of what the optimizer keeps of it (PyTorch's FSDP2); a block's
matrices are whole only while the block is computed. Each reads its part of every batch.

Nothing is pickled: what goes between processes is tensors, and a checkpoint is one safetensors file
that the first process writes, matrix by matrix. torch.distributed.checkpoint pickles its plans and
some of its metadata, and is not used.

W processes, n matrices of one shape [a,b].
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.errors import CheckpointError, ConfigError, FlexOlmoError
from flexolmo.files import LaterTensor, save_tensors, written_order
from flexolmo.model.router import LinearRouter
from flexolmo.model.transformer import Block, ForwardContext, Transformer, copy_matrix
from flexolmo.runtime import choose_device

VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # that torchrun sets
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
STATIC = "--rdzv-backend static --master-addr 127.0.0.1 --master-port 29500"
STATIC_RUN = "none"  # the name that torchrun then gives a run
GROUP = "FLEXOLMO_GROUP"  # variable: the group of a process that one of torchrun's started
_FAILED = "flexolmo/failed"  # counts the processes that ended with an error
_SILENT_SECONDS = 60.0  # after which a process is taken to have ended
_stores: Any = dist  # which does not declare them all
_inside: list[int] = []  # W while in `processes`; torch's group alone may be another program's


class _Finished(Exception):
    """End of the work of a process that is not the first."""


class _Sealed:
    """A context on its way through FSDP2, which would hand layers a copy of it and of the lists
    that they append to."""

    def __init__(self, ctx: ForwardContext):
        self.ctx = ctx


# --- one or several -----------------------------------------------------------------------------


def are_several() -> bool:
    """True inside `processes`, under torchrun, if only with one process."""
    return bool(_inside)


def count() -> int:
    """Number of processes, W."""
    return dist.get_world_size() if are_several() else 1


def is_first() -> bool:
    """True in the process that prints and writes."""
    return not are_several() or dist.get_rank() == 0


def refuse_several(what: str) -> None:
    """Raise ConfigError if there are several processes, which `what` is not made for."""
    if are_several():
        raise ConfigError(f"{what} works in one process alone: run it without torchrun.")


@contextmanager
def processes(device: str, in_group: bool = False) -> Iterator[torch.device]:
    """Take part in what torchrun started, if it did; yields the device that this process uses.

    Only the first process prints. An error is printed by the process that had it first; the others
    end without a word. `device` "cuda" is one GPU for each process. With `in_group` a process that
    torchrun did not start is the one of a group of one, and goes on from what several began.

    Raises:
        ConfigError: torchrun meets in a way that unpickles what others send.
        FlexOlmoError: another process ended before its time.
    """
    if _is_started_by_torchrun():
        store, rank, size = _meet()
    elif in_group:
        store, rank, size = _stores.HashStore(), 0, 1
        _talk_within_this_machine()
    else:
        yield choose_device(device)
        return
    with _ending_together(store, rank, size):
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
        chosen = choose_device(device)
        backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        _inside.append(size)
        yield chosen


def _is_started_by_torchrun() -> bool:
    return os.environ.keys() >= VARIABLES


@contextmanager
def _ending_together(store: Any, rank: int, size: int) -> Iterator[None]:
    """Have the first process alone print, and an error in one end all with one message."""
    ended = _ended(size)

    def stop(*_: Any) -> None:  # torchrun asks the others to end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise FlexOlmoError(ended)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with _quiet(rank != 0):
            yield
        signal.signal(signal.SIGTERM, before)
    except _Finished:
        signal.signal(signal.SIGTERM, before)
    except (FlexOlmoError, RuntimeError) as e:
        is_ours = isinstance(e, FlexOlmoError)
        if not is_ours and not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _is_first_to_fail(store):
            raise SystemExit(2) from None
        if is_ours:
            raise
        raise FlexOlmoError(f"{ended} Torch says: {str(e).splitlines()[0]}") from None
    finally:
        _leave()


def _ended(size: int) -> str:
    return (
        f"One of the {size} processes ended, was stopped or cannot be reached, so all end. Run the "
        "same command again to go on from the last checkpoint."
    )


def _meet() -> tuple[Any, int, int]:
    """The store that all processes share, this one's rank, and how many there are."""
    from torch.distributed.rendezvous import rendezvous  # which not every build of torch has

    _refuse_pickles()
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # no other can connect
        _talk_within_this_machine()
    store, rank, size = next(rendezvous("env://"))
    return _stores.PrefixStore(os.environ.get(GROUP, ""), store), rank, size


def _talk_within_this_machine() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)


def _refuse_pickles() -> None:
    """Raise ConfigError for torchrun's own way to meet (c10d), the default of some releases: it
    unpickles what anybody puts who reaches its port, and gives its run a random name."""
    if os.environ.get("TORCHELASTIC_RUN_ID", STATIC_RUN) != STATIC_RUN:
        raise ConfigError(
            "torchrun meets in a way that runs what anybody sends who reaches its port. Start it "
            f"with {STATIC}, and without --rdzv-id."
        )


@contextmanager
def _quiet(is_quiet: bool) -> Iterator[None]:
    """Let this process print nothing, if it is to be quiet."""
    with ExitStack() as stack:
        if is_quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def _leave() -> None:
    """Be one process again."""
    if are_several():
        _inside.clear()
        dist.destroy_process_group()


def _is_first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add(_FAILED, 1) == 1)
    except RuntimeError:  # the store is gone too
        return True


def first_goes_on() -> None:
    """Wait for all processes; from here on the first one is alone, and the others leave
    `processes`."""
    if are_several():
        is_done = not is_first()
        dist.barrier()
        if is_done:
            raise _Finished
        _leave()


@contextmanager
def apart() -> Iterator[None]:
    """Let each process be one by itself, for work that each does whole."""
    held = _inside[:]
    _inside.clear()
    try:
        yield
    finally:
        _inside[:] = held


def of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's values of `tensors`, which each has worked out: machines may round
    differently, and parts of a matrix must fit together."""
    found = {n: t.contiguous() for n, t in tensors.items()}
    if are_several():
        for t in found.values():
            dist.broadcast(t, 0)
    return found


def agree(flag: bool) -> bool:
    """The first process's `flag`, for a decision by its clock."""
    if not are_several():
        return flag
    said = torch.tensor([flag], dtype=torch.uint8)
    dist.broadcast(said, 0)
    return bool(said.item())


def refuse_apart(num_steps: int, path: Path) -> None:
    """Raise CheckpointError unless every process found `num_steps` steps done in `path`."""
    if not are_several():
        return
    least = torch.tensor(num_steps)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if least != most:
        raise CheckpointError(
            f"Processes found between {least} and {most} steps done in {path}. Put it where all "
            "machines see the same files."
        )


# --- processes that start others ------------------------------------------------------------------


class Meeting:
    """The processes that torchrun started, for work in processes that each of them starts.

    They leave words in the store where they met. None waits in a collective call, which would end
    after half an hour.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.rank, self.size = rank, size
        self._store = store
        self._heard: dict[int, tuple[int, float]] = {}  # signs of life of each, and when

    def say(self, key: str, text: str) -> None:
        """Leave `text` under `key` for all."""
        self._store.set(key, text)

    def heard(self, key: str) -> str | None:
        """The text that was left under `key`; none so far: None."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def group(self, name: str) -> dict[str, str]:
        """Variables of a process that takes this one's part in a group of all (see `processes`)."""
        return {GROUP: name, "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def show_life(self) -> None:
        """Tell the others that this process is there; to be called at least every few seconds."""
        self._store.add(f"life {self.rank}", 1)

    def refuse_silence(self) -> None:
        """Raise FlexOlmoError if another process has shown no life for a minute."""
        now = time.monotonic()
        for rank in set(range(self.size)) - {self.rank}:
            signs = self._store.add(f"life {rank}", 0)
            before, since = self._heard.get(rank, (-1, now))
            if signs != before:
                self._heard[rank] = (signs, now)
            elif now - since > _SILENT_SECONDS:
                raise FlexOlmoError(_ended(self.size))


@contextmanager
def meeting() -> Iterator[Meeting | None]:
    """Processes that torchrun started, without a group; none without torchrun. Who prints is as in
    `processes`."""
    if not _is_started_by_torchrun():
        yield None
        return
    store, rank, size = _meet()
    with _ending_together(store, rank, size):
        yield Meeting(_stores.PrefixStore("meeting", store), rank, size)


# --- models and tensors in parts ----------------------------------------------------------------


def place(model: nn.Module, like: Tensor) -> None:
    """Memory of dtype and device of `like` for a model on torch's device without any, or for this
    process's part of it on its own device: zeros for its buffers, nothing yet for parameters, which
    are all copied into."""
    if not are_several():
        _give_memory(model, like)
        return
    model.to(like.dtype)
    for module in model.modules():
        if isinstance(module, LinearRouter):
            module.float()  # before it is shared out
    device = _own_device()
    _share_out(cast(Transformer, model), device)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()


def share_out(model: Transformer) -> None:
    """Leave each process its part of a model that every one has whole."""
    if are_several():
        device = _own_device()
        _share_out(model.to(device), device)


def _give_memory(model: nn.Module, like: Tensor) -> None:
    """`place` in one process. (torch's own `to_empty` brings a compiler along.)"""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            memory = torch.empty_strided(
                tuple(p.shape), p.stride(), dtype=like.dtype, device=like.device
            )
            setattr(module, name, nn.Parameter(memory))
        for name, b in list(module.named_buffers(recurse=False)):
            dtype = like.dtype if b.is_floating_point() else b.dtype
            setattr(module, name, torch.zeros(tuple(b.shape), dtype=dtype, device=like.device))


def _own_device() -> torch.device:
    backends = dist.get_backend_config()
    if "nccl" not in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _share_out(model: Transformer, device: torch.device) -> None:
    """Give each process a part of every parameter's rows, gathered block by block in a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.is_contiguous():  # FSDP2 takes no other
                setattr(module, name, nn.Parameter(p.detach().contiguous(), p.requires_grad))
    # It is about results written into afterwards, which no layer does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (count(),))
    parts = [m for m in model.modules() if _is_of_other_dtype(m, model)]
    for part in [*parts, *model.layers, model.embed_tokens, model]:
        fully_shard(part, mesh=mesh)
    model.run_block = run_block
    for block in model.layers:
        block.register_forward_pre_hook(_unseal)
    register_fsdp_forward_method(model, "stream")  # and the head stays whole for the loss after it


def _unseal(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    x, sealed, layer = given
    return x, sealed.ctx, layer


def run_block(block: Block, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
    """`block.forward`, with the block whole in every process for as long as it takes."""
    found: Tensor = block(x, _Sealed(ctx), layer) if are_several() else block.forward(x, ctx, layer)
    return found


def _is_of_other_dtype(module: nn.Module, model: Transformer) -> bool:
    """True for a router in float32 beside matrices in bfloat16, whose gradients go apart."""
    if not isinstance(module, LinearRouter):
        return False
    return next(module.parameters()).dtype != model.embed_tokens.weight.dtype


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy whole `values` into `target`, of which this process may hold a part: of a file mapped
    into memory it then reads no other rows."""
    copy_matrix(local(target), cut(values, target))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The rows of `tensor` that this process holds; to write into, too."""
    return cast(Tensor, cast(Any, tensor).to_local()) if _is_in_parts(tensor) else tensor


def cut(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of `rows` [a,...] at the places that this process holds of `like` [a,...]."""
    if not _is_in_parts(like):
        return rows
    size = -(-len(like) // count())
    return rows[dist.get_rank() * size :][:size]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, in every process, all of which must ask for it."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if _is_in_parts(tensor) else tensor


def _is_in_parts(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def save_parts(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, is_private: bool
) -> None:
    """Have the first process write `tensors` as `files.save_tensors` does; one at a time is whole,
    so the parts that the processes hold, and their number, leave no trace in the file."""
    if is_first():
        later = {
            n: LaterTensor(t.dtype, tuple(t.shape), partial(whole, t.detach()))
            for n, t in tensors.items()
        }
        save_tensors(path, later, metadata, is_private=is_private)
    else:
        for name in written_order(tensors):
            whole(tensors[name].detach())


# --- a step -------------------------------------------------------------------------------------


def refuse_uneven(batch_size: int, accumulate: int, processes: int | None = None) -> None:
    """Raise ConfigError if the processes (none: those that run) cannot read equal parts of a
    batch."""
    size = count() if processes is None else processes
    if batch_size % (size * accumulate):
        raise ConfigError(
            f"A batch of {batch_size} sequences (train.batch_size), read in {accumulate} parts "
            f"(train.accumulate), cannot be shared by {size} processes: make batch_size a multiple "
            f"of {size * accumulate}, or read it in fewer parts."
        )


def own_rows(batch: np.ndarray) -> np.ndarray:
    """This process's part of a batch [B,.], [B/W,.]."""
    if not are_several():
        return batch
    size = len(batch) // count()
    return batch[dist.get_rank() * size :][:size]


def mean(x: Tensor) -> Tensor:
    """Mean of x over the processes."""
    if not are_several():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / count()


def at_owners(parts: Tensor, num_rows: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """This process's rows [n,.,b] of `work` on whole matrices [n,a,b], given its rows of each.

    Each process is sent n/W of the matrices whole, works on them, and sends the rows back: so work,
    memory and traffic are shared out, and each matrix is worked on once.

    Args:
        num_rows: a.
    """
    if not are_several():
        return work(parts)
    (n, own, b), size = parts.shape, count()
    height = -(-num_rows // size)
    each = -(-n // size)
    sent = parts.new_zeros(size * each, height, b)
    sent[:n, :own] = parts
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    matrices = received.view(size, each, height, b).transpose(0, 1).reshape(each, -1, b)
    done = work(matrices[:, :num_rows])  # [n/W,a,b]
    done = F.pad(done, (0, 0, 0, size * height - num_rows)).view(each, size, height, b)
    dist.all_to_all_single(received, done.transpose(0, 1).contiguous().view_as(sent))
    return received[:n, :own]

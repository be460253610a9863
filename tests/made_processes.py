"""Two processes that train, and what they found: forks of `test_parallel`'s, each with its rank.

One start serves all, and a fork spares the imports, which take longer than training. Each stage is
a group of its own.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

from flexolmo.cli import main
from flexolmo.data.batches import open_set
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.model import parallel
from flexolmo.model.checkpoint import load_anchor
from flexolmo.model.parallel import at_owners, cut, fill, local, processes, whole
from flexolmo.research.steps.step import StepContext
from flexolmo.research.study import train_steps
from flexolmo.train import loop
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, prepare_training, start_expert, train_expert
from flexolmo.train.loop import TrainSettings, train
from flexolmo.train.rows import hide_rows

GENTLE = TrainSettings(  # steps so small that rounding stays rounding
    steps=4, batch_size=4, seq_len=16, warmup_steps=2, learning_rate=1e-3, muon_learning_rate=2e-4
)
LOW = {"rank": 1, "attention_rank": 3, "embedding_rank": 2, "head_rank": 4}
RECIPES = {
    "whole": {},
    "whole, beside the anchor": {"beside_anchor": True},
    "ffn": {"scope": "ffn"},
    "ffn and head": {"scope": "ffn+head"},
    "low rank": LOW,
    "paper's router": {"scope": "ffn", "router": {"kind": "linear"}},
    "replayed, in parts, computed again": {
        "replay": 0.25,
        "width": 17,
        "train": GENTLE.model_copy(update={"accumulate": 2, "recompute": True}),
    },
    "adamw": {"train": GENTLE.model_copy(update={"optimizer": "adamw", "grad_clip": 1e-2})},
}
STEPS = {  # of a study, by kind: settings and inputs
    "dense": ({"set": "maths"}, {}),
    "unrestricted": ({"sets": ["maths", "news"], "top_k": 2}, {}),
    "compressed": (
        {"set": "maths", "rank": 2, "delta_rank": {}, "has_half_deltas": False},
        {"expert": "evidence maths"},
    ),
    "tuned": ({"sets": ["maths"]}, {"expert.maths": "linear maths", "proxy.maths": "proxy maths"}),
}
STAGES = 5  # of `work`, beside the steps
SHAPES = [(3, 5, 4), (4, 4, 7), (1, 9, 2), (2, 1, 3)]  # n, a, b: even and uneven over two


def recipe_of(kind):
    return ExpertRecipe(**{"train": GENTLE} | RECIPES[kind])


def losses_of(anchor, sets, kind, run_dir, threads=1, stop_after=None):
    """Losses of a run, and the numbers that this process holds of what learns."""
    recipe = recipe_of(kind)
    public = sets["public"] if recipe.replay else None
    pair, parameters, loss, _ = prepare_training(anchor, sets["maths"], "maths", recipe, public)
    arrange_blocks(pair, recipe.train, "test")

    def stopping(step):
        if step == stop_after:
            raise KeyboardInterrupt
        return loss(step)

    settings = recipe.train
    if stop_after is not None:
        settings = settings.model_copy(update={"checkpoint_every_seconds": 1e-9})
    about = {"kind": kind, "threads": threads}
    losses = None
    with contextlib.suppress(KeyboardInterrupt):
        losses = train(parameters, stopping, settings, run_dir, "test", about, {}).losses_nats
    return losses, sum(local(p).numel() for p in parameters.values())


def do_step(kind, here, inputs, device="cpu"):
    """Losses of the training in a step of `kind`, done in `here`; `inputs` are directories."""
    settings, more = STEPS[kind]
    train = GENTLE.model_dump(mode="json")
    if kind == "compressed":
        train["optimizer"] = "adamw"
    roles = {"corpus": "corpus", "anchor": "anchor", **more}
    context = StepContext(
        kind,
        {**settings, "train": train, "seed": 0},
        {role: inputs / place for role, place in roles.items()},
        here,
        device,
    )
    here.mkdir(parents=True, exist_ok=True)
    getattr(train_steps, kind)(context)
    parallel.first_goes_on()
    return json.loads((here / "run" / "metrics.json").read_text())["loss_nats"]


def square(x):
    """Work on whole matrices that no part of their rows could do."""
    return x @ x.mT @ x


def matrices(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def moved_parts(rank):
    """Rows of `square` of matrices, of which this process had only its own."""
    found = []
    for shape in SHAPES:
        x = matrices(shape)
        rows = slice(rank * -(-shape[1] // 2), (rank + 1) * -(-shape[1] // 2))
        found.append(at_owners(x[:, rows], shape[1], square).tolist())
    return found


def refusal_of(anchor, sets, run_dir, **changes):
    recipe = ExpertRecipe(**{"train": GENTLE} | changes)
    try:
        train_expert(anchor, sets["maths"], "maths", recipe, run_dir)
    except ConfigError as e:
        return str(e)
    return None


def losses_apart(anchor, sets, run_dir, begun):
    """What is said if the first process sees a run that the other does not."""
    if parallel.is_first():
        shutil.copytree(begun, run_dir)
    try:
        losses_of(anchor, sets, "whole", run_dir)
    except CheckpointError as e:
        return str(e)
    return None


def round_trip(anchor, sets):
    """True if what is put into parts comes out whole, and in rows that `cut` names."""
    _, parameters, _, _ = prepare_training(
        anchor, sets["maths"], "maths", recipe_of("low rank"), None
    )
    ok = True
    for p in parameters.values():
        values = matrices(p.shape)
        fill(p.detach(), values)
        ok &= torch.equal(whole(p.detach()), values)
        ok &= torch.equal(local(p.detach()), cut(values, p))
    return ok


def moved_head(anchor, sets, kind):
    """The matrix of an expert's head in a mixture, where rows that no table tells of have moved."""
    data, recipe = sets["maths"], recipe_of(kind)
    start = start_expert(anchor, data, recipe)
    key = "lm_head.lora_b" if kind == "low rank" else "lm_head.weight"
    start[key] = start[key] + matrices(start[key].shape)
    start |= hide_rows(anchor, start)
    _, parameters, _, _ = prepare_training(anchor, data, "maths", recipe, None, start)
    head = whole(parameters[key].detach())
    assert not torch.equal(head, start[key])
    return head.tolist()


def command(port, *arguments):
    """Exit code of the command line, in a group of its own."""
    os.environ["MASTER_PORT"] = port
    sys.argv = ["flexolmo", *map(str, arguments)]
    try:
        main()
    except SystemExit as e:
        return e.code or 0
    return 0


def work(here, anchor_dir, set_dirs, ports):
    rank = int(os.environ["RANK"])
    found = {}
    os.environ["MASTER_PORT"] = ports[0]
    with processes("cpu"):
        print("a word of this process")
        anchor = load_anchor(anchor_dir, is_mapped=True)
        sets = {name: open_set(path) for name, path in set_dirs.items()}
        found["losses"] = {
            kind: losses_of(anchor, sets, kind, here / f"two {i}") for i, kind in enumerate(RECIPES)
        }
        found["resumed"] = losses_of(anchor, sets, "whole", here / "stopped", threads=7)
        found["moved"] = moved_parts(rank)
        found["heads"] = [moved_head(anchor, sets, kind) for kind in ("whole", "low rank")]
        found["is round"] = round_trip(anchor, sets)
        found["apart"] = losses_apart(anchor, sets, here / f"of {rank}", here / "stopped")
        uneven = GENTLE.model_copy(update={"batch_size": 6, "accumulate": 2})
        private = {"privacy": {"epsilon": 8}, "router": {"kind": "evidence", "epsilon": 2}}
        found["refused"] = [
            refusal_of(anchor, sets, here / "no", train=uneven),
            refusal_of(anchor, sets, here / "no", **private),
            refusal_of(anchor, sets, here / "no", router=private["router"]),
            refusal_of(anchor, sets, None),
        ]
    gentle = [f"--set=train.{k}={v}" for k, v in GENTLE.model_dump(exclude_defaults=True).items()]
    shape = ("d_model=32", "num_layers=2", "num_heads=4", "d_ff=48", "max_seq_len=64")
    sizes = [f"--set=model.{size}" for size in shape]
    public, out = f"--data={set_dirs['public']}", f"--out={here / 'anchor'}"
    found["anchor"] = command(ports[1], "anchor", "train", public, out, *gentle, *sizes)
    own = [f"--anchor={anchor_dir}", f"--data={set_dirs['maths']}", "--name=maths", *gentle]
    found["expert"] = command(ports[2], "expert", "train", *own, f"--out={here / 'expert'}")
    found["bad"] = command(ports[3], "expert", "train", *own, "--set=train.batch_size=3")
    found["steps"] = {}
    for kind, port in zip(STEPS, ports[STAGES:], strict=True):
        os.environ["MASTER_PORT"] = port
        with processes("cpu") as device:
            found["steps"][kind] = do_step(kind, here / kind, here / "inputs", str(device))
    (here / f"found{rank}.json").write_text(json.dumps(found))

    def dies(batch):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        loop.own_rows = dies
    code = command(ports[4], "expert", "train", *own, f"--out={here / 'dying'}")
    (here / "survivor.json").write_text(json.dumps([rank, code, parallel.are_several()]))


def in_two_processes(here, *given):
    """Do `work` in two processes; what each printed, and what it said of errors.

    As torchrun does, this one holds the stores by which they meet: nobody else takes their ports.
    """
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _ in range(STAGES + len(STEPS))
    ]
    ports = [str(store.port) for store in stores]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(here / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": "0"}
                os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
                work(here, *given, ports)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    late = time.monotonic() + 300
    while children and time.monotonic() < late:
        time.sleep(0.05)
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [tuple((here / f"{n}{rank}").read_text() for n in ("out", "err")) for rank in range(2)]

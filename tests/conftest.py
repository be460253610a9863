"""A pico anchor, prepared sets, keys and experts that the tests of all rooms share.

The anchor is real but tiny: 2 layers, width 32, a tokenizer of 300 ids learned from made text,
trained for a few steps. Everything is made here, in about two seconds, with no network.
"""

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name

# Read when torch is loaded, here and in the processes that tests start: one thread unless a test
# says otherwise, and none that keeps a core busy while it waits for work.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import numpy as np
import pytest
import torch
from hypothesis import settings

from flexolmo.bundle.signing import create_key
from flexolmo.data.batches import TokenSet, open_set
from flexolmo.data.corpus import open_corpus
from flexolmo.data.prepare import prepare_set
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, build_anchor, save_anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings, RouterSettings
from flexolmo.model.shape import ExpertShape, expert_shapes
from flexolmo.model.statistics import UNTOLD, BigramModel, EvidenceSettings, log_probs
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.train.anchor import AnchorRecipe, AnchorShape, train_anchor
from flexolmo.train.loop import TrainSettings
from flexolmo.train.rows import hide_rows
from made_commands import build_commands_once
from made_documents import write_documents
from made_mixtures import House, draw_weights
from made_sets import SMALL, made_text, write_raw
from made_shell import Shell, make_demo

gc.disable()  # until all tests are collected, see below: hardly any of that becomes garbage
build_commands_once()
torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it for its jobs

SMALL_SETS = PrepareSettings(
    min_document_bytes=20,
    max_document_bytes=5000,
    min_split_bytes=300,
    validation_share=0.05,
    heldout_share=0.05,
    vocab_size=300,
)
FEW_WINDOWS = {
    "flexolmo.data.batches.EMBEDDING_WINDOWS": 4,
    "flexolmo.train.compress.CURVATURE_WINDOWS": 8,
    "flexolmo.train.compress.PRUNING_WINDOWS": 8,
}
LEFT_OUT = {"modules": 0}  # how many modules' objects no collection looks at
ROUTERS = {
    "evidence": EvidenceSettings(),
    "linear": LinearSettings(),
    "linear without bias": LinearSettings(has_bias=False),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests that share a dear start: an idle worker takes over what another would do
    last, and would start again."""
    items.sort(key=lambda item: item.path.stem != "test_parallel")


def pytest_collection_finish() -> None:
    """Leave modules and collected tests, millions of objects, out of every later collection of
    garbage."""
    leave_out_what_is_loaded()
    gc.set_threshold(20_000, 20)  # what is left to look through is little
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """Leave out what a test has loaded too, such as torch's compiler. Cycles among the fixtures
    that live then are never collected."""
    yield
    if len(sys.modules) > LEFT_OUT["modules"] + 200:
        leave_out_what_is_loaded()


def leave_out_what_is_loaded() -> None:
    """Collect garbage, and keep what is left for good."""
    gc.collect()
    gc.freeze()
    LEFT_OUT["modules"] = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def shipped_windows() -> Iterator[dict[str, int]]:
    """By name, how many windows of a text stand for all of it. Of text that is made a few do, those
    of FEW_WINDOWS, which all tests have but those that ask for `as_shipped`."""
    shipped = {name: resolve_name(name) for name in FEW_WINDOWS}
    with pytest.MonkeyPatch.context() as patch:
        for name, count in FEW_WINDOWS.items():
            patch.setattr(name, count)
        yield shipped


@pytest.fixture
def as_shipped(shipped_windows, monkeypatch) -> None:
    """For tests of these numbers: as many windows as a user has."""
    for name, count in shipped_windows.items():
        monkeypatch.setattr(name, count)


def prepare_made_set(where: Path, name: str, texts: list[str], public: Path | None) -> Path:
    """The prepared set of `texts`, in `where`/prepared."""
    (where / "in").mkdir(parents=True)
    (where / "in" / "all.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "id": f"d{i}"}) for i, t in enumerate(texts))
    )
    corpus = open_corpus(where / "in", name, licence="CC0-1.0")
    prepare_set(corpus, where / "prepared", public=public, settings=SMALL_SETS)
    return where / "prepared"


@pytest.fixture(scope="session")
def pico_set_dirs(tmp_path_factory) -> dict[str, Path]:
    """Prepared sets by name: public, maths, news; each owner's in a directory of its own."""
    here = tmp_path_factory.mktemp("pico_sets")
    public = prepare_made_set(here / "public", "public", write_documents("public", 150, 0), None)
    return {"public": public} | {
        name: prepare_made_set(here / name, name, write_documents(name, 40, 0), public)
        for name in ("maths", "news")
    }


@pytest.fixture(scope="session")
def pico_sets(pico_set_dirs) -> dict[str, TokenSet]:
    """The sets of `pico_set_dirs`, opened."""
    return {name: open_set(path) for name, path in pico_set_dirs.items()}


@pytest.fixture(scope="session")
def pico_recipe() -> AnchorRecipe:
    """What `pico_anchor` is trained by: 2 layers, width 32."""
    return AnchorRecipe(
        model=AnchorShape(
            d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=512
        ),
        train=TrainSettings(steps=60, batch_size=8, seq_len=32, warmup_steps=3, learning_rate=0.02),
    )


@pytest.fixture(scope="session")
def pico_anchor(pico_sets, pico_set_dirs, pico_recipe) -> Anchor:
    """An anchor of 2 layers and width 32, trained for 60 steps."""
    tokenizer = load_tokenizer(pico_set_dirs["public"])
    return train_anchor(pico_sets["public"], tokenizer, pico_recipe, num_threads=1)


@pytest.fixture(scope="session")
def pico_anchor_dir(pico_anchor, tmp_path_factory) -> Path:
    """`pico_anchor`, saved; do not change it in place."""
    directory = tmp_path_factory.mktemp("pico_anchor") / "anchor"
    save_anchor(pico_anchor, directory)
    return directory


@pytest.fixture(scope="session")
def owner_keys(tmp_path_factory) -> dict[str, Path]:
    """Private signing keys by owner; the public one lies beside it as <owner>.pub."""
    directory = tmp_path_factory.mktemp("keys")
    for owner in ("Ann", "Bob"):
        create_key(directory / owner)
    return {owner: directory / owner for owner in ("Ann", "Bob")}


@pytest.fixture(scope="session")
def trust_dir(owner_keys, tmp_path_factory) -> Path:
    """Directory of Ann's and Bob's public keys."""
    where = tmp_path_factory.mktemp("trusted")
    for owner, key in owner_keys.items():
        shutil.copy(f"{key}.pub", where / f"{owner}.pub")
    return where


def make_levels(
    tensors: dict[str, torch.Tensor], public: BigramModel, generator: torch.Generator
) -> None:
    """Levels of a random table, as an owner's text could give them: sums of at most 1."""
    size = len(public.unigram)

    def levels(probs: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
        return ((probs.log() - logs) / 0.5).floor().clamp(-20, 20).to(torch.int8)

    tokens = torch.randn(size, generator=generator).mul(1.5).softmax(0)
    tensors["router.token_levels"] = levels(tokens, torch.from_numpy(public.unigram))
    tensors["router.token_levels"][::7] = UNTOLD
    if "router.bigram_keys" in tensors:
        keys = torch.randperm(size**2, generator=generator)
        is_told = tensors["router.token_levels"] != UNTOLD
        keys = keys[is_told[keys // size] & is_told[keys % size]]
        keys = keys[: len(tensors["router.bigram_keys"])].msort()
        probs = torch.rand(len(keys), generator=generator)
        sums = torch.zeros(size).index_add(0, keys // size, probs)[keys // size]
        logs = torch.from_numpy(log_probs(public, keys.numpy()))
        tensors["router.bigram_keys"] = keys
        tensors["router.bigram_levels"] = levels(0.9 * probs / sums, logs)


@dataclass
class Wild:
    """An untrained anchor with large random weights, and experts for it.

    A trained pico model routes almost uniformly; laws are tested where every term matters.
    """

    anchor: Anchor

    def __post_init__(self) -> None:
        self._drawn = lru_cache(maxsize=100)(self._draw)  # many tests merge the same few experts

    def shape(self, d_ff: int | None = None, **sizes: int) -> ExpertShape:
        """Of an expert with a whole FFN of the anchor's width, unless it says otherwise."""
        return ExpertShape(**{"d_ff": d_ff or self.anchor.config.d_ff, "num_bigrams": 3000} | sizes)

    def expert(
        self, router: RouterSettings, seed: int, d_ff: int | None = None, **sizes: int
    ) -> dict[str, torch.Tensor]:
        """Random tensors of one expert, in the anchor's dtype (router parts in float32).

        Products B A are about as large as the matrices they are added to.
        """
        drawn = self._drawn(router, seed, self.shape(d_ff, **sizes))
        return {n: t.clone() for n, t in drawn.items()}

    def _draw(
        self, router: RouterSettings, seed: int, shape: ExpertShape
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        config = self.anchor.config
        dtype = self.anchor.model.lm_head.weight.dtype
        tensors = {}
        for name, size in expert_shapes(config, shape, router).items():
            t = torch.randn(size, generator=generator)
            if name.endswith(("lora_a", "lora_b")) or (
                name.endswith(".weight") and "router" not in name
            ):
                t = (t * size[-1] ** -0.5).to(dtype)
            elif name.endswith("router.weight"):
                t = t * 0.5
            tensors[name] = t
        if isinstance(router, EvidenceSettings):
            make_levels(tensors, self.anchor.public, generator)
        return tensors | hide_rows(self.anchor, tensors)

    def rich_shapes(self, router: RouterSettings, names: str | list[str]) -> dict[str, ExpertShape]:
        """By name: experts that hold all that `router` allows, whole and low-rank in turn."""
        D = self.anchor.config.d_model
        more = (
            {}
            if isinstance(router, LinearSettings)
            else {"attention_rank": (D, 3), "embedding_rank": (2, D), "head_rank": (D, 4)}
        )
        return {
            n: self.shape(rank=(0, 3)[i % 2], **{k: v[i % 2] for k, v in more.items()})
            for i, n in enumerate(names)
        }

    def mixture(
        self,
        router: RouterSettings,
        names: str | list[str],
        top_k: int | None = None,
        shapes: Mapping[str, ExpertShape] | None = None,
    ) -> MixtureModel:
        """A mixture of experts by name; an expert's tensors depend on its name alone.

        Without `shapes`, by name, some are narrow and all have whole FFNs and nothing besides.
        """
        experts = {}
        for n in names:
            number = sum(n.encode())
            shape = shapes[n] if shapes else self.shape(48 if number % 2 else 20)
            experts[n] = self.expert(router, number, **shape.model_dump())
        return assemble_mixture(self.anchor, experts, router, top_k=top_k)

    def ids(self, batch: int, length: int, seed: int = 0, eos_every: int = 9) -> torch.Tensor:
        """Random ids [batch,length]; about one in `eos_every` ends a document."""
        rng = np.random.default_rng([seed, batch, length])
        ids = rng.integers(0, self.anchor.config.vocab_size, (batch, length))
        ids[rng.random(ids.shape) < 1 / eos_every] = self.anchor.config.eos_token_id
        return torch.from_numpy(ids)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that FLEXOLMO_TEST_DEVICE names, by default the CPU."""
    return torch.device(os.environ.get("FLEXOLMO_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def make_wild(pico_anchor, device):
    """`make_wild(dtype, **changes of ModelConfig)`: a Wild anchor of 2 layers and width 32, on
    `device`."""

    def make(dtype: torch.dtype = torch.float32, **changes) -> Wild:
        config = ModelConfig.model_validate(pico_anchor.config.model_dump() | changes)
        model = Transformer(config)
        draw_weights(model, seed=1)
        rows = (
            torch.randn(
                config.num_layers, config.d_model, generator=torch.Generator().manual_seed(2)
            )
            * 0.5
        )
        return Wild(
            build_anchor(
                model.to(device, dtype),
                pico_anchor.tokenizer,
                pico_anchor.public,
                rows,
                {},
                forms=pico_anchor.forms,
            )
        )

    return make


@pytest.fixture(scope="session")
def wild(make_wild) -> Wild:
    """A Wild anchor in float32."""
    return make_wild()


@pytest.fixture(scope="session", params=ROUTERS)
def router(request) -> RouterSettings:
    """Each kind of router in turn."""
    return ROUTERS[request.param]


@pytest.fixture(scope="session")
def house(wild, owner_keys, tmp_path_factory) -> House:
    """An anchor with large random weights, two owners, and a workshop for bundles."""
    return House(wild, owner_keys, tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="session")
def public_set(tmp_path_factory) -> Path:
    """A prepared public set of 60 documents with a tokenizer of 300 entries."""
    here = tmp_path_factory.mktemp("public")
    raw = write_raw(here, "public", [made_text(i) for i in range(60)])
    prepare_set(raw, here / "prepared", settings=SMALL)
    return here / "prepared"


@pytest.fixture(scope="session")
def shell(tmp_path_factory):
    """Runs scripts as a reader of the documentation would."""
    made = Shell(tmp_path_factory.mktemp("shell"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def _demo(shell, tmp_path_factory) -> Path:
    return make_demo(shell, tmp_path_factory.mktemp("demo_root") / "flexolmo")


@pytest.fixture
def demo_root(_demo, tmp_path) -> Path:
    """A checkout as after `make demo`, of a tiny model, to do with as one likes."""
    return shutil.copytree(_demo, tmp_path / "flexolmo", symlinks=True)

"""Bundles and mixtures of untrained experts with large random weights, for the tests.

An expert's tensors depend on its name alone, so the same name gives the same expert in every
bundle. Two owners have keys: Ann signs names that start with a to m, Bob the others.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from flexolmo.bundle.bundle import write_bundle
from flexolmo.bundle.manifest import build_manifest
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.merge.mixture import LoadedMixture, build_mixture, load_mixture
from flexolmo.model.checkpoint import Anchor, save_anchor
from flexolmo.model.router import LinearSettings, RouterSettings
from flexolmo.model.shape import architecture_of, shape_of_tensors
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.train.expert import ExpertRecipe
from made_bundles import TERMS

NAMES = ("amber", "basalt", "zinc")
IN_SESSION = settings(
    deadline=None,
    derandomize=True,
    max_examples=6,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROUTERS: dict[str, RouterSettings] = {
    "evidence": EvidenceSettings(),
    "linear": LinearSettings(),
    "stock": LinearSettings(has_bias=False),
    "rich": EvidenceSettings(),
}  # with experts that hold more than an FFN


def owner_of(name: str) -> str:
    """Who signs the expert."""
    return "Ann" if name[0] <= "m" else "Bob"


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Random weights large enough that no part of a model is near zero or near uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.3 * noise)


@dataclass(repr=False)
class House:
    """An anchor on disk, owners' keys, and a workshop for bundles and mixtures."""

    wild: Any  # conftest.Wild
    keys: dict[str, Path]
    root: Path
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def anchor(self) -> Anchor:
        """The anchor, in memory."""
        return self.wild.anchor

    @cached_property
    def anchor_dir(self) -> Path:
        """The anchor, saved; do not change it in place."""
        save_anchor(self.anchor, self.root / "anchor")
        return self.root / "anchor"

    @property
    def trusted(self) -> TrustedOwners:
        """Ann's and Bob's public keys."""
        return TrustedOwners.from_keys(
            {o: Path(f"{k}.pub").read_bytes() for o, k in self.keys.items()}
        )

    def tensors(self, name: str, router: str) -> dict[str, Tensor]:
        """The expert's tensors; some experts are narrower than the anchor's FFN, or low-rank."""
        number = sum(name.encode())
        sizes = {"d_ff": 48 if number % 2 else 20}
        if router == "rich":
            sizes = {
                "rank": 3 * (number % 2),
                "attention_rank": 2,
                "embedding_rank": 3,
                "head_rank": 4,
            }
        return self.wild.expert(ROUTERS[router], number, **sizes)

    def architecture(self, tensors: dict[str, Tensor]) -> dict[str, int]:
        """What a bundle of these tensors claims of their sizes."""
        config = self.anchor.config
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        return architecture_of(config, shape_of_tensors(shapes, config))

    def write(
        self, where: Path, name: str, tensors: dict[str, Tensor], router: str, **changes: Any
    ) -> Path:
        """Sign `tensors` into `where`/NAME.bundle; `changes` are of the manifest, or `key`."""
        weights = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
        settings = ROUTERS[router]
        scope = "all" if router == "rich" else "ffn"
        key = changes.pop("key", self.keys[owner_of(name)])
        today = changes.pop("today", None)
        claims = {
            "owner": owner_of(name),
            "anchor_digest": self.anchor.digest,
            "architecture": self.architecture(tensors),
            "router_kind": settings.kind,
            "router_settings": settings.model_dump(mode="json"),
            "recipe": ExpertRecipe(scope=scope, router=settings).model_dump(mode="json"),
            "tokens_seen": 7,
            "data_card_digest": "sha256:" + "0" * 64,
            "serial": 1,
            "licence": "MIT",
            "terms": TERMS,
        } | changes
        manifest = build_manifest(weights, name=name, **claims)
        return write_bundle(where / f"{name}.bundle", weights, manifest, key, today=today)

    def bundle(self, name: str, router: str = "evidence") -> Path:
        """A good bundle, signed once; do not change it in place."""
        if (name, router) not in self._made:
            self._made[name, router] = self.write(
                self.root / f"out-{router}", name, self.tensors(name, router), router
            )
        return self._made[name, router]

    def bundles(self, names: Any, router: str = "evidence") -> list[Path]:
        """Good bundles of several names."""
        return [self.bundle(n, router) for n in names]

    def build(
        self, names: Any, out: Path, router: str = "evidence", top_k: int | None = None
    ) -> Path:
        """A mixture of its own at `out`, free to change: no file is shared with a bundle."""
        build_mixture(self.anchor_dir, self.bundles(names, router), out, self.trusted, top_k=top_k)
        for file in out.rglob("*"):
            if file.is_file():  # break hard links
                data = file.read_bytes()
                file.unlink()
                file.write_bytes(data)
        return out

    def mixture_dir(self, names: Any, router: str = "evidence", top_k: int | None = None) -> Path:
        """A mixture built once; do not change it in place."""
        key = ("mixture", tuple(names), router, top_k)
        if key not in self._made:
            out = self.root / f"model{len(self._made)}"
            build_mixture(
                self.anchor_dir, self.bundles(names, router), out, self.trusted, top_k=top_k
            )
            self._made[key] = SimpleNamespace(path=out, loaded=load_mixture(out, self.trusted))
        return self._made[key].path

    def mixture(
        self, names: Any, router: str = "evidence", top_k: int | None = None
    ) -> LoadedMixture:
        """The mixture of `mixture_dir`, loaded once."""
        self.mixture_dir(names, router, top_k)
        return self._made["mixture", tuple(names), router, top_k].loaded


def tree(directory):
    """Every file below `directory`, its bytes by relative path."""
    return {
        str(f.relative_to(directory)): f.read_bytes()
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }


def flip(file, place, change):
    """Change one byte of `file`, `place` of the way through it; returns the old content."""
    old = file.read_bytes()
    at = min(int(place * len(old)), len(old) - 1)
    file.write_bytes(old[:at] + bytes([old[at] ^ change]) + old[at + 1 :])
    return old


def differ_in_router(house, where, name, router, **changes):
    return house.write(where, name, house.tensors(name, router), router, **changes)

"""Export of a mixture, whatever it is made of, with the code that transformers runs it with.

Beside the weights goes `modeling_flexolmo.py`, which is all that is needed of FlexOlmo; loaded with
`trust_remote_code=True`, it computes what the mixture computes here. Terms and policies do not
travel: whoever loads the checkpoint chooses who may take part.

E experts, D d_model, V vocabulary.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.files import read_json, write_bytes, write_directory_aside, write_json
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import (
    DiscriminantRouter,
    DiscriminantSettings,
    EvidenceRouter,
    LevelTable,
    LinearRouter,
    slot,
)
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.stock import stock_config, stock_name, write_stock

CODE = Path(__file__).with_name("modeling_flexolmo.py")
AUTO_MAP = {
    "AutoConfig": "modeling_flexolmo.FlexOlmoMixtureConfig",
    "AutoModelForCausalLM": "modeling_flexolmo.FlexOlmoMixtureForCausalLM",
}
EVIDENCE = ("switch_rate", "tempering", "clip_nats", "min_weight", "public_order")


def export_code(mixture: LoadedMixture, out: Path) -> None:
    """Write the mixture to `out`, exactly, with the code that loads it and a README that says how.

    The router's float32 numbers stay so, whatever precision the rest is in.
    """
    model = mixture.model
    dtype = model.embed_tokens.weight.dtype
    config = stock_config(
        model.config,
        dtype,
        architectures=["FlexOlmoMixtureForCausalLM"],
        model_type="flex_olmo_mixture",
        auto_map=AUTO_MAP,
        experts={n: shape.model_dump() for n, shape in model.shapes.items()},
        experts_per_token=model.top_k,
        end_of_text_id=model.config.eos_token_id,
        document_mask=model.config.document_mask,
        router=_router_config(model),
    )
    with write_directory_aside(out, "flexolmo.json") as aside:
        write_stock(aside, config, code_tensors(model), _with_start(mixture.tokenizer))
        about = read_json(aside / "tokenizer_config.json")
        about["split_special_tokens"] = True  # no text spells a special token
        write_json(aside / "tokenizer_config.json", about)
        shutil.copyfile(CODE, aside / CODE.name)
        write_bytes(aside / "README.md", _readme(mixture, Path(out).name).encode())
        facts = {
            n: {"owner": f.owner, "licence": f.licence, "terms": f.terms.model_dump(mode="json")}
            for n, f in mixture.facts.items()
        }
        write_json(aside / "flexolmo.json", {"experts": facts, "exact": True})
        mixture.refuse_changed_files()


def code_tensors(model: MixtureModel) -> dict[str, Tensor]:
    """Every tensor of the mixture, by its name in `modeling_flexolmo.py`.

    Names are those of our own modules. Routers are written as they are used: a table as the
    evidence worked out from it, a row's bias as what is added to the logit.
    """
    found = {
        stock_name(name): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("router.") and ".mlp.router." not in name
    }
    if model.router is not None:
        found |= _table_tensors(model.router)
    for i, layer in enumerate(model.mixtures()):
        if layer.router is None:
            continue
        for name in model.expert_names:
            weight, offset = _row(layer.router, name, model.config.d_model)
            key = f"model.layers.{i}.mlp.router.{slot(name)}"
            found[f"{key}.weight"] = weight
            found[f"{key}.bias"] = offset
    return found


def _with_start(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of `tokenizer` that puts the end-of-text token before every text, as is done here."""
    start = {"SpecialToken": {"id": tokenizer.eos, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    token = {"id": tokenizer.eos, "ids": [tokenizer.eos_id], "tokens": [tokenizer.eos]}
    template = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {tokenizer.eos: token},
    }
    return Tokenizer({**tokenizer.definition, "post_processor": template}, tokenizer.eos)


def _router_config(model: MixtureModel) -> dict[str, Any]:
    """The router's kind, the settings that it computes with, and the sizes of its tables."""
    settings = model.settings
    if isinstance(settings, EvidenceSettings):
        router = cast(EvidenceRouter, model.router)
        forms = [cast(LevelTable, form) for form in router.forms]
        return {
            "kind": settings.kind,
            "public_pairs": len(router.public.bigram_keys),
            "form_pairs": [len(form.bigram_keys) for form in forms],
            **{key: getattr(settings, key) for key in EVIDENCE},
        }
    if isinstance(settings, DiscriminantSettings):
        half_life = settings.half_life_tokens if settings.has_context else None
        return {
            "kind": settings.kind,
            "tempering": settings.tempering,
            "half_life_tokens": half_life,
        }
    return {"kind": settings.kind}


def _table_tensors(router: EvidenceRouter) -> dict[str, Tensor]:
    """Tables of public text, its forms and the owners' text."""
    public = router.public
    found = {
        "router.public.tokens": public.unigram,
        "router.public.contexts": public.backoff,
        "router.public.keys": public.bigram_keys,
        "router.public.pairs": public.bigram_log_probs,
    }
    tables = {f"router.forms.{i}": form for i, form in enumerate(router.forms)}
    tables |= {f"router.tables.{slot(n)}": router.table(n) for n in router.names[1:]}
    for key, module in tables.items():
        table = cast(LevelTable, module)
        found[f"{key}.tokens"] = table.tokens
        found[f"{key}.contexts"] = table.contexts
        found[f"{key}.keys"] = table.bigram_keys
        found[f"{key}.pairs"] = table.pairs
    return found


def _row(
    router: LinearRouter | DiscriminantRouter, name: str, d_model: int
) -> tuple[Tensor, Tensor]:
    """One expert's row [1,R] of one layer, and what is added to its product, [1]."""
    nothing = torch.zeros(1)
    if isinstance(router, DiscriminantRouter):
        if name == PUBLIC:
            return torch.zeros(1, router.settings.num_features(d_model)), nothing
        row = router.row(name)
        return row.weight, row.offset
    raw = router.bias(name)
    if raw is None:
        return router.row(name).weight, nothing
    is_clamped = router.settings.bias_form == "clamp"
    return router.row(name).weight, raw.clamp(max=0) if is_clamped else -F.softplus(raw)


def _readme(mixture: LoadedMixture, name: str) -> str:
    """Markdown that says how the checkpoint `name` is loaded, and whose experts it holds."""
    names = mixture.expert_names
    some = ", ".join(f'"{n}"' for n in names[:1])
    arguments = f'**tokenizer("The", return_tensors="pt"), experts=[{some}], max_new_tokens=20'
    lines = [
        f"# {name}",
        "",
        "A FlexOlmo mixture, for transformers 5.16 or later, with its own code: read",
        "`modeling_flexolmo.py` before you trust it.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        f"answer = model.generate({arguments})",
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
        "```",
        "",
        "`experts` names who may take part; without it all do, with `[]` the public model alone. A",
        "batch may have a list for each text. Whoever is not named changes no number.",
        "",
        "| expert | owner | licence |",
        "|---|---|---|",
        *(f"| {n} | {f.owner} | {f.licence} |" for n, f in mixture.facts.items()),
        "",
        "Owners' terms of use are in `flexolmo.json`. They bind whoever loads this; nothing here",
        "checks them.",
        "",
    ]
    return "\n".join(lines)

"""The public anchor: trained on public text, or imported from a stock checkpoint."""

import copy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from flexolmo.config import Settings
from flexolmo.data.batches import TokenSet, embedding_windows, training_batches
from flexolmo.data.forms import FAMILIES, write_form
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.model.checkpoint import Anchor, build_anchor
from flexolmo.model.hidden_statistics import mean_hidden_state
from flexolmo.model.loss import language_model_loss
from flexolmo.model.parallel import are_several, count, fill, first_goes_on, place
from flexolmo.model.statistics import (
    PUBLIC_DOCUMENTS,
    BigramModel,
    EvidenceSettings,
    OwnerTable,
    fit_bigrams,
    fit_table,
    in_public_steps,
)
from flexolmo.model.stock import DtypeName, StockConfig, build_transformer, read_stock, stock_name
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.progress import progress
from flexolmo.runtime import run_record, set_up
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.loop import TrainSettings, identity_of, in_parts, read_learnt, train

FORM_DOCUMENTS = 20_000  # of public text, that are written in other forms
FORM_SENTENCES = 20  # of each


class AnchorShape(Settings):
    """Sizes of the anchor; its vocabulary is the tokenizer's."""

    d_model: int = Field(192, description="Width of the residual stream.")
    num_layers: int = Field(4, description="Number of blocks.")
    num_heads: int = Field(3, description="Number of attention heads.")
    num_kv_heads: int | None = Field(None, description="Key-value heads; none: as many as heads.")
    d_ff: int = Field(512, description="Width of the FFN.")
    max_seq_len: int = Field(1024, description="Positions, in tokens.")
    document_mask: bool = Field(
        False,
        description="Keep attention within a document where windows hold several. Experts and "
        "mixtures of this anchor do the same, in training, evaluation and generation.",
    )


class AnchorRecipe(Settings):
    """Settings that, with the data, decide a trained anchor."""

    seed: int = Field(
        0, ge=0, description="Random seed of the first weights and the order of batches."
    )
    model: AnchorShape = AnchorShape()
    train: TrainSettings = TrainSettings(steps=700)


def train_anchor(
    public: TokenSet,
    tokenizer: Tokenizer,
    recipe: AnchorRecipe,
    run_dir: Path | None = None,
    num_threads: int | None = None,
    device: str | torch.device = "cpu",
) -> Anchor:
    """Train an anchor on the public set's training split.

    With `run_dir`, resumes a run that was cut off there and writes its record beside the metrics.
    The anchor's model stays on `device`; after several processes (see `model.parallel`), of which
    the first alone returns, it is mapped from the run's checkpoint.
    """
    public.check_tokenizer(tokenizer.digest, "the anchor")
    set_up(recipe.seed, num_threads, keeps_memory=not are_several())
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **recipe.model.model_dump()
    )
    config.refuse_longer(recipe.train.seq_len, "train.seq_len")
    with torch.device("meta"):
        model = Transformer(config)
    place(model, torch.empty(0, device=device))
    model.initialise(recipe.seed, fill)
    record = run_record(recipe.model_dump(mode="json"), recipe.seed, {public.name: public.digest})
    batches = training_batches(
        public, "train", recipe.train.batch_size, recipe.train.seq_len, recipe.seed
    )

    record["is_compiled"] = arrange_blocks(model, recipe.train, "anchor")
    compiled = {"is_compiled": True} if record["is_compiled"] else {}

    def loss_of(ids: Tensor) -> Tensor:
        return language_model_loss(model, ids)

    result = train(
        dict(model.named_parameters()),
        in_parts(batches.batch, loss_of, recipe.train),
        recipe.train,
        run_dir,
        "anchor",
        identity_of(recipe, data=public.digest) | compiled,
        record,
    )
    record |= {"tokens": result.tokens, "seconds": round(result.seconds, 1)}
    if are_several() and run_dir is not None:
        record["processes"] = count()
        first_goes_on()
        learnt = {stock_name(n): t for n, t in read_learnt(run_dir).items()}
        model = build_transformer(config, learnt, str(run_dir), is_mapped=True)
    return describe_anchor(model, tokenizer, public, record)


def import_anchor(
    directory: Path,
    public: TokenSet,
    dtype: DtypeName | None = None,
    document_mask: bool | None = None,
) -> Anchor:
    """Read an anchor from a stock `Olmo2ForCausalLM` checkpoint, in the precision stock runs it in.

    `public` is a public set prepared with that checkpoint's tokenizer; it gives the statistics
    that owners' experts are held against. `dtype` (float32, bfloat16) is another precision;
    `document_mask` (see `AnchorShape`) is what the checkpoint's config says, else off.
    """
    config, tensors = read_stock(directory, StockConfig, dtype)
    tokenizer = load_tokenizer(directory)
    public.check_tokenizer(tokenizer.digest, f"the checkpoint {directory}")
    changes: dict[str, Any] = {"eos_token_id": tokenizer.eos_id}
    if document_mask is not None:
        changes["document_mask"] = document_mask
    shape = config.decoder.model_copy(update=changes)
    model = build_transformer(shape, tensors, str(directory))
    record = run_record({"imported_from": Path(directory).name}, 0, {public.name: public.digest})
    return describe_anchor(model, tokenizer, public, record)


def describe_anchor(
    model: Transformer, tokenizer: Tokenizer, public: TokenSet, record: dict[str, Any]
) -> Anchor:
    """Build an anchor from a dense model and statistics of public text, which owners need."""
    split = public.splits["train"]
    statistics = fit_bigrams(split.tokens, split.source_offsets, model.config.vocab_size)
    row = mean_hidden_state(model.eval(), embedding_windows(public, model.config.max_seq_len))
    return build_anchor(
        model,
        tokenizer,
        statistics,
        row.repeat(model.config.num_layers, 1),
        copy.deepcopy(record),
        forms=fit_forms(public, tokenizer, statistics),
    )


def fit_forms(public: TokenSet, tokenizer: Tokenizer, statistics: BigramModel) -> list[OwnerTable]:
    """A table of public training text in each family of forms, fitted as an owner's, but of all
    that PUBLIC_DOCUMENTS documents hold; none of those that too few can be written in.

    Up to FORM_DOCUMENTS documents, evenly spread, are each written in one form of each family,
    drawn by a fixed seed. Source: ours.
    """
    split = public.splits["train"]
    draw = Random(0)
    spread = np.linspace(0, split.num_documents - 1, min(FORM_DOCUMENTS, split.num_documents))
    rows: dict[str, list[np.ndarray]] = {family: [] for family in FAMILIES}
    with progress("forms of public text", len(spread), "documents") as meter:
        for index in dict.fromkeys(spread.astype(int).tolist()):
            text = tokenizer.decode(split.document(index).tolist())
            for family, forms in FAMILIES.items():
                written = write_form(draw.choice(forms), text, draw, FORM_SENTENCES)
                if written is not None:
                    (ids,) = tokenizer.encode_batch([written])
                    rows[family].append(np.array([*ids, public.eos_id], dtype=np.int32))
            meter.advance()
    settings = in_public_steps(EvidenceSettings(min_documents=PUBLIC_DOCUMENTS))
    tables = []
    for texts in rows.values():
        stream = np.concatenate([np.zeros(0, np.int32), *texts])
        offsets = np.cumsum([0, *map(len, texts)])
        tables.append(fit_table(stream, offsets, statistics, settings))
    return [table for table in tables if table.is_told.any()]

"""Choices in preparing a set, which its card holds."""

from pydantic import Field

from flexolmo.config import Settings


class PrepareSettings(Settings):
    """Choices of `prepare_set`; ours, except where a table is named."""

    min_document_bytes: int = Field(
        1, ge=1, description="Least bytes of UTF-8 that a source document must have to be kept."
    )
    max_document_bytes: int = Field(
        50_000,
        ge=4,
        description="Largest piece in bytes; longer documents are cut, at blank lines first.",
    )
    near_duplicate: float | None = Field(
        None,
        ge=0.05,
        le=1,
        description="Share of word 5-grams (Jaccard) from which one of two documents of the set "
        "is dropped as nearly the same; none: filled-in forms and the like all stay.",
    )
    normalise: bool = Field(
        False,
        description="Compose characters (Unicode NFC), cut spaces at the end of lines and blank "
        "lines after two in a row.",
    )
    validation_share: float = Field(
        0.05, ge=0, lt=0.5, description="Share of source documents for choosing settings."
    )
    heldout_share: float = Field(
        0.05, ge=0, lt=0.5, description="Share of source documents that are only ever reported."
    )
    min_split_bytes: int = Field(
        60_000,
        ge=0,
        description="Bytes of validation and of held-out text, if that is below a tenth.",
    )
    vocab_size: int = Field(
        4096, description="Entries of the tokenizer that is trained when none is given."
    )

"""Error types, each named for the person who must act.

Messages say what was found, what was expected, where, and what to do next. The command line
prints the message and exits with code 2; a traceback means a defect of ours.
"""


class FlexOlmoError(Exception):
    """Base of every error we raise on purpose."""


class DiskFullError(FlexOlmoError):
    """Whoever runs the command must act: a disk, a quota or a file-size limit is used up."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class ConfigError(FlexOlmoError):
    """Whoever wrote the recipe or the command must act: unknown key, bad value."""


class DataError(FlexOlmoError):
    """Whoever supplies text must act: unreadable file, empty set, wrong tokenizer."""


class SourceUnavailable(DataError):
    """A package client or a package is missing; the set it feeds can be skipped by name."""


class CheckpointError(FlexOlmoError):
    """Whoever supplies a model directory must act: missing, misshapen or foreign tensors."""


class BundleError(FlexOlmoError):
    """The owner must act: the bundle is damaged, incomplete or not of this format."""


class SignatureError(BundleError):
    """The owner or the coordinator must act: signature wrong, or signer not trusted."""


class MergeError(FlexOlmoError):
    """The coordinator must act: bundles that do not fit this anchor or each other."""


class PolicyError(FlexOlmoError):
    """Whoever runs the model must act: unknown expert, contradictory switches."""

"""Error types, each named for the person who must act.

Messages say what was found, what was expected, where, and what to do next. The command line
prints the message and exits with code 2; a traceback means a defect of ours.
"""


class FlexOlmoError(Exception):
    """Base of every error we raise on purpose."""


class DiskFullError(FlexOlmoError):
    """Error for whoever runs the command: a disk, a quota or a file-size limit is used up."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["DiskFullError"], tuple[str, str]]:
        return type(self), (str(self), self.reason)  # so that a worker can send it


class UnfinishedError(FlexOlmoError):
    """Error for whoever runs the command: some work was not done; what was done is kept, and the
    same command goes on from there."""


class ConfigError(FlexOlmoError):
    """Error for whoever wrote the recipe or the command: unknown key, bad value."""


class DataError(FlexOlmoError):
    """Error for whoever supplies text: unreadable file, empty set, wrong tokenizer."""


class SourceUnavailable(DataError):
    """Error for a missing package or package client; its set can be skipped by name."""


class CheckpointError(FlexOlmoError):
    """Error for whoever supplies a model directory: missing, misshapen or foreign tensors."""


class BundleError(FlexOlmoError):
    """Error for the owner: the bundle is damaged, incomplete or not of this format."""


class SignatureError(BundleError):
    """Error for the owner or the coordinator: signature wrong, or signer not trusted."""


class RevokedError(SignatureError):
    """Error for whoever uses an expert: its owner has revoked it."""


class MergeError(FlexOlmoError):
    """Error for the coordinator: bundles that do not fit this anchor or each other."""


class ProofError(FlexOlmoError):
    """Error for whoever asks for a certificate or checks one: what it states does not hold."""


class PolicyError(FlexOlmoError):
    """Error for whoever runs the model: unknown expert, contradictory switches."""


class BusyError(FlexOlmoError):
    """Error for whoever asks: the server has as many requests as it takes; ask again later."""


class AuditError(FlexOlmoError):
    """Error for whoever runs the server: its audit log cannot be written, or does not hold up."""

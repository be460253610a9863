"""The one error that a server tells whoever asks."""

from flexolmo.errors import FlexOlmoError


class Refusal(FlexOlmoError):
    """Error for whoever asks: a request that is not served, or an answer that ends early.

    The message is shown to them, so it quotes no key, no token and no prompt.

    Attributes:
        status: As HTTP numbers it.
        code: For programs; one word for each reason.
        field: Field of the request that is wrong, if it is one.
        retry_seconds: Time after which to ask again, if that may help.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_seconds: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.retry_seconds = retry_seconds

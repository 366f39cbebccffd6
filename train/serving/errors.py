"""Errors in the shape of OpenAI's API."""


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        # They may quote what was sent, and JSON can hold halves of surrogate pairs, which UTF-8 cannot.
        self.message = message.encode(errors="replace").decode()
        self.param = None if param is None else param.encode(errors="replace").decode()
        self.status, self.code = status, code
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, object]:
        """The JSON that says so."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

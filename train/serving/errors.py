"""Errors in the format of the OpenAI API."""


class ApiError(Exception):
    """An error response to a request."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        # Messages can quote the request. JSON strings can contain lone surrogates, which UTF-8 cannot encode.
        self.message = message.encode(errors="replace").decode()
        self.param = None if param is None else param.encode(errors="replace").decode()
        self.status, self.code = status, code
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, object]:
        """The JSON body of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

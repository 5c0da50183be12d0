"""The one exception of this package."""


class StreamError(ValueError):
    """A stream cannot be opened, or a row in it cannot be used; the message names where and says what to do."""

"""The error type for mistakes of a user."""


class SlimeError(ValueError):
    """Bad input or a mismatch; the message says what is wrong, with the values, and what to do."""

"""The one error type a user of SLiMe can cause."""


class SlimeError(ValueError):
    """Bad input or a mismatch; the message says what was wrong, with the values seen, and what to do."""

"""Errors that a person can put right; their messages name the remedy. Needs no torch."""


class ConfigError(ValueError):
    """A recipe, an override or a value that cannot be used; the message names the key or file and the remedy."""


class BrokenFile(RuntimeError):
    """A file that was readable when the list was made and no longer is."""


class WorkerDied(RuntimeError):
    """A process that loads images and ended before its work was done."""

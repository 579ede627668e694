"""The root of all errors that a user can mend."""


class RunError(Exception):
    """Bad input or a run that can't go on: the command prints the message, not a traceback.

    The message says what was found, what was wanted, and the knob or command that mends it.
    """


class BatchNotFilled(RunError):
    """Too few prompts passed the accuracy window within `rollout.max_rounds` rounds."""


class NotFinite(RunError, FloatingPointError):
    """A loss, gradient or log-prob is NaN or infinite."""


class WeightsError(RunError, ValueError):
    """A checkpoint whose tensors are not those of the model; the message names file and tensor."""


class OtherRankFailed(RunError):
    """All that this rank knows is that another one had an error; that one tells which."""


class Interrupted(Exception):
    """The run was asked to end, and has saved: no error, but not the end of its work either."""

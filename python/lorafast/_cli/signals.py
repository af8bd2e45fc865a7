"""Signals that end the command as Ctrl-C does, wherever they come: it cleans up first."""

from __future__ import annotations

# What `signal` is made of: making its enumerations takes longer than all that is done here.
# Type checkers do not know it.
import _signal  # type: ignore[import-not-found]
import sys

# Not `typing`'s, whose import takes time as well.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

#: The signals by name, for Windows has no SIGHUP; with what is printed.
WORDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}
#: What a shell adds to the number of a signal that ended a command.
EXIT_OF_SIGNALS = 128


class Stopped(KeyboardInterrupt):
    """A signal that ends the command.

    As a KeyboardInterrupt it passes everything that lets Ctrl-C pass, and cancels the core's work.

    Attributes:
        lorafast_outcome: what to print, and the exit code.
    """

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.lorafast_outcome = (words, status)


def end_as_by_ctrl_c() -> None:
    """Makes these signals raise `Stopped` in a process that is the command's own.

    One that is ignored stays so: `nohup` starts a command that is to outlive its terminal.
    """
    sys.unraisablehook = _raise_later
    for name in WORDS:
        number = getattr(_signal, name, None)
        if number is not None and _signal.getsignal(number) == _signal.SIG_DFL:
            _signal.signal(number, _stop)


#: Seconds after which a destructor is over.
LATER = 0.01


def _raise_later(unraisable: Any) -> None:
    """Raises what stops the command once more.

    Python drops what is raised in a destructor or in the callback of a weak reference (an import
    has some), and a signal's exception comes wherever the signal does.
    """
    stop = unraisable.exc_value
    if not isinstance(stop, KeyboardInterrupt) or not hasattr(_signal, "setitimer"):
        sys.__unraisablehook__(unraisable)
        return

    def again(_number: int, _frame: FrameType | None) -> None:
        raise stop

    _signal.signal(_signal.SIGALRM, again)
    _signal.setitimer(_signal.ITIMER_REAL, LATER)


def raise_no_more() -> None:
    """Ends what `_raise_later` does: the command is over, and the interpreter about to be."""
    sys.unraisablehook = sys.__unraisablehook__
    if hasattr(_signal, "setitimer"):
        _signal.setitimer(_signal.ITIMER_REAL, 0)


def _stop(number: int, _frame: FrameType | None) -> None:
    # Once: what cleans up is not to be stopped by a second one.
    words = ""
    for name, own in WORDS.items():
        other = getattr(_signal, name, None)
        if other is not None:
            _signal.signal(other, _signal.SIG_IGN)
        if other == number:
            words = own
    raise Stopped(words, EXIT_OF_SIGNALS + number)

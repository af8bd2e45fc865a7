"""The exceptions of lorafast.

```
Exception
└── LorafastError
    ├── CheckpointError               a base that is broken, or no model
    ├── AdapterError                  an adapter that is broken, or no adapter
    │   └── UnsupportedAdapterError   sound, but with something that cannot be merged
    ├── PlanError                     base and adapters that do not fit together
    ├── OutputError                   an output that may not or cannot be written
    ├── StoreError                    an object store that refuses or cannot be reached (an OSError)
    ├── NumericError                  a result outside the range of its type
    ├── DeviceError                   a device that torch does not see, or cannot use
    ├── VerificationError             an output that reads back as something else
    ├── TensorNotFoundError           a name that no tensor of a merge has (a KeyError)
    ├── WorkerError                   a worker of an executor that died
    └── MissingDependencyError        an optional package that is not installed (an ImportError)
```

A path that is not there is a `FileNotFoundError` with that path, another refusal of the operating
system the `OSError` it is, and an argument outside its domain a `ValueError`.
"""

from __future__ import annotations


class LorafastError(Exception):
    """The base of every exception that lorafast defines."""


class CheckpointError(LorafastError):
    """A base checkpoint is broken, or is no model that can be read."""


class AdapterError(LorafastError):
    """An adapter is broken, or is no adapter."""


class UnsupportedAdapterError(AdapterError):
    """An adapter is sound but uses something, named in the message, that cannot be merged."""


class PlanError(LorafastError):
    """Base and adapters do not fit together.

    Attributes:
        problems: every problem that was found, a sentence each.
    """

    problems: list[str]

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message, problems if problems is not None else [message])
        self.problems = self.args[1]

    def __str__(self) -> str:
        return str(self.args[0])


class OutputError(LorafastError):
    """The output may not or cannot be written where it was asked for."""


class StoreError(LorafastError, OSError):
    """An object store refused, or could not be reached; the message names the object."""


class NumericError(LorafastError):
    """A merge or conversion would make a finite weight NaN or infinite."""


class DeviceError(LorafastError):
    """A device is not there, or cannot compute what is needed."""


class VerificationError(LorafastError):
    """What was written reads back as something else than what was computed."""


class TensorNotFoundError(LorafastError, KeyError):
    """A merged model has no tensor of the name that was asked for."""

    # A KeyError shows its message in quotes.
    __str__ = Exception.__str__


class WorkerError(LorafastError):
    """A worker of an executor died before its task was done."""


class MissingDependencyError(LorafastError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


def interruption_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C, or the signal, that an error came of, if it came of one.

    Python 3.11 wraps what is raised while a class is made, and an import makes classes.
    """
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__cause__ or behind.__context__
    return behind


def raise_interruption(error: BaseException) -> None:
    """Raises the Ctrl-C, or the signal, that an error came of, if it came of one.

    For handlers that take whatever a stranger's file or library raises.
    """
    stop = interruption_behind(error)
    if stop is not None:
        raise stop


def missing(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """The error for an optional package that is not there.

    Args:
        package: the name to import.
        extra: the extra of lorafast that installs it.
        purpose: what it is needed for, to end the sentence "… is needed to".
    """
    return MissingDependencyError(
        f'{package} is needed to {purpose}; install it with: pip install "lorafast[{extra}]"'
    )

"""Tables of options: each option's type, default and flag, and what follows from a table.

A table is a named tuple class with a field for each option: its type and its default are the
field's, what the command says of it is its `Flag`. Everything else follows: the command's flags
and its help, which values are refused, and what the signature of a public function has to be. A
function passes the one value of a table on.
"""

# Annotations are evaluated: named tuples would compile each that is a text.
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
)


class Flag(NamedTuple):
    """How the command tells of an option, and which verbs take it."""

    help: str | None
    """What the help says; an option without is none of the command's."""
    verbs: tuple[str, ...] = ()
    """Those of the verbs that share a table which take the option; all of them if empty."""
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    """What there is to choose from, where the type is no `Literal`."""
    check: Callable[[str], Any] | None = None
    """Returns the value of a text (of a sequence, that of an item), or raises a `ValueError` that
    says what is wrong with it."""
    output: bool = False
    """Whether it is about what is written rather than about how it is made."""
    other_help: Mapping[str, str] = {}
    """What the help of some verbs says instead."""
    name: str | None = None
    """What the flag is called, where the option's name is not used."""
    short: str | None = None
    """Its letter, if it has one."""
    older_name: str | None = None
    """A flag that the command understands as well and does not show."""
    repeated: bool = False
    """Whether the flag of a sequence takes one item, and is given again for each other."""
    unit: int | None = None
    """How many of the option's units make one of the flag's, which is given as a decimal."""


class Option(NamedTuple):
    """An option as a table has it."""

    name: str
    default: Any
    members: tuple[Any, ...]
    """Its type; those it is a union of."""
    flag: Flag
    help: str | None
    """What the help of the verb that was asked about says."""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The values it may have, where they can be listed."""
        if self.flag.choices is not None:
            return self.flag.choices
        for member in self.members:
            if get_origin(member) is Literal:
                return get_args(member)
        return None

    @property
    def is_mapping(self) -> bool:
        """Whether it is some values by their names."""
        return any(get_origin(member) is Mapping for member in self.members)

    @property
    def holds_texts(self) -> bool:
        """Whether the values by names are texts rather than numbers."""
        return any(
            get_origin(member) is Mapping and get_args(member)[1] is str for member in self.members
        )

    @property
    def items(self) -> Any:
        """The type of its items, where it is a sequence."""
        for member in self.members:
            if get_origin(member) is Sequence:
                return get_args(member)[0]
        return None


if TYPE_CHECKING:
    from typing import Protocol, TypeVar

    class Table(Protocol):
        """A named tuple whose fields are options."""

        def __init__(self, **options: Any) -> None: ...

        def _asdict(self) -> dict[str, Any]: ...

    T = TypeVar("T", bound=Table)


#: The flag of worker threads, of every command that has one.
THREADS = Flag("threads to use (default: one for each core)", metavar="N")


def device_flag(what: str) -> Flag:
    """The flag of a device for analysis.

    Args:
        what: what is done there, as a sentence: "products are made".
    """
    return Flag(
        f"where {what}: cpu, cuda, cuda:N, auto (CUDA where there is a device), or torch:cpu "
        "to compare backends (default: %(default)s)",
        metavar="DEVICE",
        check=_device,
    )


def executor_flag(what: str) -> Flag:
    """The flag of who does the work.

    Args:
        what: what is done there, as a sentence: "the adapters are read".
    """
    return Flag(
        f"where {what}: ray (a Ray cluster), processes or processes:N on this machine, each with "
        "--threads threads, 1 if missing (default: in this process)",
        metavar="NAME",
        check=_executor,
    )


def _executor(name: str) -> str:
    from lorafast._io.executors import check_executor_name

    return check_executor_name(name)


def _device(name: str) -> str:
    from lorafast._io.device_names import check_name

    return check_name(name)


def options_in(*tables: "type[Table]", verb: str | None = None) -> Iterator[Option]:
    """The options of some tables, in the order of the help.

    Args:
        tables: the tables.
        verb: only those that this verb takes, with what its help says.
    """
    for table in tables:
        # Every named tuple has them; a protocol of it may not say so.
        defaults: dict[str, Any] = table._field_defaults  # type: ignore[attr-defined]
        for name, annotation in table.__annotations__.items():
            kind, flag = annotation.__origin__, annotation.__metadata__[0]
            if verb is None or not flag.verbs or verb in flag.verbs:
                words = flag.other_help.get(verb, flag.help)
                yield Option(name, defaults[name], members_of(kind), flag, words)


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types that a type is a union of, or itself alone."""
    # `Literal[…] | None` is one of typing's own unions.
    return get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)


def pick(table: "type[T]", arguments: Mapping[str, Any]) -> "T":
    """Those of a function's arguments that are options of a table."""
    return table(**{name: arguments[name] for name in table.__annotations__ if name in arguments})


def check_choices(options: "Table") -> None:
    """Checks each option that is one of some values.

    Raises:
        ValueError: it is none of them.
    """
    given = options._asdict()
    for option in options_in(type(options)):
        value, choices = given[option.name], option.choices
        if choices is not None and value not in (*choices, option.default):
            raise ValueError(f"{option.name} must be one of {', '.join(choices)}, not {value!r}")

"""The classes that a network knows, by their names: those of its folders, or numbers where nobody named them."""

from dataclasses import dataclass

from models.errors import ModelError

SHOWN = 12


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes 0 … K - 1. Raises ModelError for two of one name, and for one without."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) and name for name in self.names) or len(set(self.names)) < len(self.names):
            raise ModelError(f"every class has a name of its own: {', '.join(map(repr, self.names))}")

    @classmethod
    def numbered(cls, count: int) -> "ClassNames":
        """Classes that are called by their numbers."""
        return cls(tuple(map(str, range(count))))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """All of them, as a sentence lists them."""
        if self == ClassNames.numbered(len(self)):
            return f"0 to {len(self) - 1}"
        more = f" and {len(self) - SHOWN} more" if len(self) > SHOWN else ""
        return ", ".join(self.names[:SHOWN]) + more

    def index(self, asked: str | int) -> int:
        """The number of a class, asked for by its name or number ("207" or 207); a name goes before a number.

        Raises ModelError for a class that there is not, with those that there are.
        """
        if not self.names:
            raise ModelError(f"this model knows no classes, {asked!r} neither: the one prompt for it is the empty one")
        if asked in self.names:
            return self.names.index(asked)
        number = int(asked) if isinstance(asked, int) or str(asked).strip().isdecimal() else -1
        if not 0 <= number < len(self):
            raise ModelError(f"there is no class {asked!r}; there are {len(self)}: {self}")
        return number

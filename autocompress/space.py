"""A search space as data: choices, the blocks that depend on them, and architectures.

Architectures travel in two forms. Between engine, strategies and costs they are rows of an integer array
`codes (n, choices)`, each entry the position of an option; an `Architecture` is one row for people, files
and keys. Both are canonical: a choice that has no effect (a gene of a block that depth leaves out) holds
its first option, so that equal networks are equal rows.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import SpaceError
from autocompress.ops import CellSpec, Ops, block_key

if TYPE_CHECKING:
    from autocompress.elastic.supernet import Supernet

Option = int | float | str
Codes = NDArray[np.int64]
"""`(n, choices)`: for each architecture and choice the position of the option in `Choice.options`."""

Setting = tuple[Option, ...]

MAX_JOINT_PARENTS = 1_000_000
"""Largest number of joint settings of connected conditions that counting enumerates."""


@dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
        name: Unique in its space, for example `stage1.block2.kernel`.
        options: At least one, without repetition, from smallest to largest where there is an order: the
            first of every choice is the smallest network, the last the largest.
        ordinal: Whether the order of the options means something.
        active_when: Conditions that must all hold for the choice to have an effect, each a choice that
            stands earlier in the space and the options of it that keep this one active.
        terms: For each option the edges of the space it is made of, with what each of them is. A cell whose
            nodes keep two of many edges has options of two terms: what is searched are nodes, what is mixed
            are edges. Without terms, the choice itself is mixed.
    """

    name: str
    options: tuple[Option, ...]
    ordinal: bool = True
    active_when: tuple[tuple[str, tuple[Option, ...]], ...] = ()
    terms: tuple[tuple[tuple[str, Option], ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Check names and options."""
        if not self.name:
            raise SpaceError("a choice needs a name, got ''")
        if not self.options:
            raise SpaceError(f"choice {self.name!r} needs at least one option, got none")
        for option in self.options:
            # Subclasses too are refused: `True` would equal 1; numpy's integers cannot be written as JSON.
            finite = not isinstance(option, float) or math.isfinite(option)
            if type(option) not in (int, float, str) or not finite:
                raise SpaceError(
                    f"options of choice {self.name!r} must be integers, finite floats or texts, "
                    f"got {option!r}"
                )
        if len(set(self.options)) != len(self.options):
            raise SpaceError(f"choice {self.name!r} has an option twice: {self.options}")
        if self.terms and len(self.terms) != len(self.options):
            raise SpaceError(
                f"choice {self.name!r} needs terms for each of its {len(self.options)} options, got "
                f"{len(self.terms)}"
            )

    def code(self, option: Option) -> int:
        """Return the position of an option.

        Raises:
            SpaceError: The choice has no such option; `True` is not 1 here, and `'3'` is not 3.
        """
        for position, known in enumerate(self.options):
            if known == option and isinstance(known, str) == isinstance(option, str):
                if isinstance(option, bool):
                    break
                return position
        raise SpaceError(f"choice {self.name!r} has no option {option!r}; allowed: {list(self.options)}")


@dataclass(frozen=True)
class Block:
    """A part of the network: what runs for one setting of the few choices it depends on.

    Attributes:
        name: Unique in its space; becomes the name of the part in an extracted network.
        choices: Names of the choices it depends on, depth and resolution included.
        operations: Called with one option a choice, in the order of `choices`; returns the operations, and
            none where the block is not active. Must be a pure function that can be pickled.
        parts: Blocks of fewer of these choices each, whose costs add up to that of the block: the edges of a
            cell. They price it, and are never run in sequence.
        edges: Of a cell, the edges that its mixture has, in its order; without, its choices are its edges.
    """

    name: str
    choices: tuple[str, ...]
    operations: Callable[..., Ops]
    parts: tuple["Block", ...] = ()
    edges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One network of a space; immutable, hashable, the same key on every machine.

    Attributes:
        space: Name of the space.
        settings: Choice and option, in the order of the space; choices without effect are left out.
    """

    space: str
    settings: tuple[tuple[str, Option], ...]

    @property
    def key(self) -> str:
        """Return 16 hexadecimal digits that depend on the space's name and the settings only."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __getitem__(self, choice: str) -> Option:
        """Return the option of an active choice; `KeyError` for one without effect."""
        return dict(self.settings)[choice]

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no white space."""
        payload = {"space": self.space, "choices": dict(self.settings)}
        return json.dumps(payload, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class _Component:
    """Choices whose activity hangs together: the joint settings of the parents and what each is worth."""

    parents: tuple[int, ...]
    settings: Codes
    networks: tuple[int, ...]
    """Exact number of distinct networks for each joint setting of the parents."""


@dataclass(frozen=True)
class SearchSpace:
    """What can be chosen: data only; neither weights nor devices nor data sets.

    Attributes:
        name: Stands in every architecture, table and checkpoint.
        choices: In the order of decision. Put choices that many blocks share (resolution, depth) first:
            bounds on prefixes are then small tables.
        blocks: In the order of execution.
        settings: What the constructor was called with, for files that must say which space they are of.
        supernet_factory: Makes the space's supernet; `None` is the generic one built from the blocks.
        edges: What the terms of choices speak of, and mixtures decide: each with its options.
        worth: By name of a choice, what its options are worth by some criterion, without any evaluation: of
            channels, the sum of the importance of those that are kept.
    """

    name: str
    choices: tuple[Choice, ...]
    blocks: tuple[Block, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    supernet_factory: Callable[["SearchSpace"], "Supernet"] | None = field(default=None, compare=False)
    edges: tuple[Choice, ...] = ()
    worth: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Check that names are unique and that every reference resolves."""
        positions: dict[str, int] = {}
        for position, choice in enumerate(self.choices):
            if choice.name in positions:
                raise SpaceError(f"space {self.name!r} has choice {choice.name!r} twice")
            for parent, allowed in choice.active_when:
                if parent not in positions:
                    raise SpaceError(
                        f"choice {choice.name!r} depends on {parent!r}, which must stand before it in "
                        f"space {self.name!r}; before it stand {list(positions)}"
                    )
                for option in allowed:
                    self.choices[positions[parent]].code(option)
            positions[choice.name] = position
        if not self.choices:
            raise SpaceError(f"space {self.name!r} has no choices")
        edges = {edge.name: edge for edge in self.edges}
        if len(edges) < len(self.edges) or edges.keys() & positions.keys():
            raise SpaceError(f"edges of space {self.name!r} need names of their own, got {list(edges)}")
        for name in (*(name for block in self.blocks for name in block.edges), *self._edges_of_terms()):
            if name not in edges:
                raise SpaceError(f"{name!r} is no edge of space {self.name!r}; it has {list(edges)}")
        for choice in self.choices:
            for edge, option in {term for terms in choice.terms for term in terms}:
                edges[edge].code(option)
        names = [block.name for block in self.blocks]
        if len(set(names)) != len(names):
            raise SpaceError(f"space {self.name!r} has two blocks of one name: {names}")
        for block in self.blocks:
            if len(set(block.choices)) != len(block.choices):
                raise SpaceError(f"block {block.name!r} names a choice twice: {block.choices}")
            for name in block.choices:
                if name not in positions:
                    raise SpaceError(
                        f"block {block.name!r} depends on {name!r}, which is no choice of space {self.name!r}"
                    )
            for part in block.parts:
                if not set(part.choices) <= set(block.choices):
                    raise SpaceError(
                        f"part {part.name!r} depends on {list(part.choices)}, its block {block.name!r} on "
                        f"{list(block.choices)} only"
                    )

    def _edges_of_terms(self) -> Iterator[str]:
        return (edge for choice in self.choices for terms in choice.terms for edge, _ in terms)

    @cached_property
    def variables(self) -> dict[str, Choice]:
        """What mixtures weigh, by name: choices, and the edges of which others are made."""
        own = {choice.name: choice for choice in self.choices if not choice.terms}
        return own | {edge.name: edge for edge in self.edges}

    @cached_property
    def positions(self) -> dict[str, int]:
        """Position of each choice by name."""
        return {choice.name: position for position, choice in enumerate(self.choices)}

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of options of each choice, shape `(choices,)`."""
        return np.array([len(choice.options) for choice in self.choices], dtype=np.int64)

    @cached_property
    def _first_columns(self) -> NDArray[np.int64]:
        """Column of the first option of each choice in the one-hot encoding."""
        return np.cumsum(self.counts) - self.counts

    # Activity and counting ---------------------------------------------------------------------------

    @cached_property
    def _activity(self) -> list[tuple[int, bool, NDArray[np.bool_]]]:
        """Choices that others depend on: position, whether they can lose their effect, what they keep active.

        Row o of the last, `(options + 1, choices)`, holds for option o; the last row, for no effect.
        """
        tables: dict[int, NDArray[np.bool_]] = {}
        for position, choice in enumerate(self.choices):
            for name, allowed in choice.active_when:
                parent = self.choices[self.positions[name]]
                shape = (len(parent.options) + 1, len(self.choices))
                table = tables.setdefault(self.positions[name], np.ones(shape, dtype=np.bool_))
                kept = np.zeros(len(table), dtype=np.bool_)
                kept[[parent.code(option) for option in allowed]] = True
                table[:, position] &= kept
        return [(at, bool(self.choices[at].active_when), table) for at, table in sorted(tables.items())]

    def active(self, codes: Codes) -> NDArray[np.bool_]:
        """Return which choices have an effect, shape `(n, choices)`."""
        result = np.ones(codes.shape, dtype=np.bool_)
        for parent, conditional, table in self._activity:
            option = codes[:, parent]
            if conditional:
                # A parent without effect switches its dependants off too.
                option = np.where(result[:, parent], option, len(table) - 1)
            result &= table.take(option, axis=0)
        return result

    def canonical(self, codes: Codes) -> Codes:
        """Return the codes with the first option wherever a choice has no effect."""
        return codes * self.active(codes)

    @cached_property
    def _components(self) -> list[_Component]:
        """Split the conditions into connected groups and count the networks of each joint setting."""
        parents_of = [{self.positions[parent] for parent, _ in choice.active_when} for choice in self.choices]
        group = list(range(len(self.choices)))

        def find(position: int) -> int:
            while group[position] != position:
                position = group[position]
            return position

        for position, above in enumerate(parents_of):
            for parent in above:
                group[find(position)] = find(parent)
        members: dict[int, list[int]] = {}
        for position in range(len(self.choices)):
            members.setdefault(find(position), []).append(position)
        components = []
        for inside in members.values():
            parents = sorted({parent for position in inside for parent in parents_of[position]})
            joint = math.prod(int(self.counts[parent]) for parent in parents)
            if joint > MAX_JOINT_PARENTS:
                names = [self.choices[parent].name for parent in parents]
                raise SpaceError(
                    f"the conditions on {names} have {joint} joint settings; at most {MAX_JOINT_PARENTS} "
                    "can be counted: make fewer choices depend on each other"
                )
            combinations = itertools.product(*(range(int(self.counts[parent])) for parent in parents))
            settings = np.array(list(combinations), dtype=np.int64).reshape(joint, len(parents))
            codes = np.zeros((joint, len(self.choices)), dtype=np.int64)
            codes[:, parents] = settings
            active = self.active(codes)
            children = [position for position in inside if position not in parents]
            networks = []
            for row in range(joint):
                inactive = [p for p in parents if not active[row, p] and codes[row, p] != 0]
                # A non-first option of a parent without effect is the same network again.
                free = math.prod(int(self.counts[child]) for child in children if active[row, child])
                networks.append(0 if inactive else free)
            components.append(_Component(tuple(parents), settings, tuple(networks)))
        return components

    @cached_property
    def size(self) -> int:
        """Exact number of distinct networks: canonical rows."""
        return math.prod(sum(component.networks) for component in self._components)

    # Rows --------------------------------------------------------------------------------------------

    def sample(
        self, n: int, rng: np.random.Generator, *, over: Literal["genes", "networks"] = "genes"
    ) -> Codes:
        """Draw `n` architectures, shape `(n, choices)`, canonical.

        Args:
            n: How many.
            rng: Source of randomness.
            over: `"genes"` draws every choice uniformly, then makes the row canonical; a shallow network,
                which many genotypes stand for, is then as likely as a deep one. `"networks"` gives every
                distinct network the same probability; nearly all of them are deep.

        Raises:
            SpaceError: `over` is neither.
        """
        if over not in ("genes", "networks"):
            raise SpaceError(f"over must be 'genes' or 'networks', got {over!r}")
        codes = (rng.random((n, len(self.choices))) * self.counts).astype(np.int64)
        if over == "networks":
            for component in self._components:
                if not component.parents:
                    continue
                total = sum(component.networks)
                weights = np.array([count / total for count in component.networks])
                rows = rng.choice(len(weights), size=n, p=weights / weights.sum())
                codes[:, component.parents] = component.settings[rows]
        return self.canonical(codes)

    def mutate(self, codes: Codes, rng: np.random.Generator, *, rate: float = 0.1) -> Codes:
        """Change each active gene with probability `rate` to another option, at least one gene a row.

        Returns:
            Canonical codes of the shape given; a row changes unless its space has one network only.

        Raises:
            SpaceError: `rate` is not in 0..1.
        """
        if not 0 <= rate <= 1:
            raise SpaceError(f"rate must be in 0..1, got {rate}")
        draws = np.where(self.active(codes) & (self.counts > 1), rng.random(codes.shape), 2.0)
        # In any case the changeable gene with the smallest draw changes.
        threshold = np.clip(draws.min(axis=1, keepdims=True), rate, 1.0)
        rows, columns = np.nonzero(draws <= threshold)
        counts = self.counts[columns]
        steps = 1 + (rng.random(len(rows)) * (counts - 1)).astype(np.int64)
        result = codes.copy()
        result[rows, columns] = (codes[rows, columns] + steps) % counts
        return self.canonical(result)

    def crossover(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Take each gene from either parent with even odds; canonical, shape of the parents."""
        return self.canonical(np.where(rng.random(first.shape) < 0.5, first, second))

    def largest(self) -> Codes:
        """Return the last option of every choice, shape `(1, choices)`."""
        return self.canonical((self.counts - 1)[None, :])

    def smallest(self) -> Codes:
        """Return the first option of every choice, shape `(1, choices)`."""
        return np.zeros((1, len(self.choices)), dtype=np.int64)

    def one_hot(self, codes: Codes) -> NDArray[np.float32]:
        """Encode rows for predictors: one column an option, all zero where a choice has no effect.

        Returns:
            Shape `(n, sum of options)`, 0 or 1.
        """
        columns = int(self.counts.sum())
        result = np.zeros(len(codes) * columns, dtype=np.float32)
        # Flat positions: `put_along_axis` takes three times as long.
        index = codes + self._first_columns
        index += np.arange(0, len(result), columns)[:, None]
        result[index] = self.active(codes)
        return result.reshape(len(codes), columns)

    # Objects -----------------------------------------------------------------------------------------

    def encode(self, architectures: Sequence[Architecture]) -> Codes:
        """Return the rows of architectures, shape `(n, choices)`.

        Raises:
            SpaceError: An architecture is of another space, names an unknown choice or option, or lacks
                a choice that has an effect.
        """
        rows = [self._encode(dict(a.settings), a.space) for a in architectures]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.choices))

    def _encode(self, given: Mapping[str, Any], space: str) -> list[int]:
        if space != self.name:
            raise SpaceError(f"the architecture is of space {space!r}, not of {self.name!r}")
        for name in given:
            if name not in self.positions:
                raise SpaceError(
                    f"space {self.name!r} has no choice {name!r}; its choices are {list(self.positions)}"
                )
        row = [0] * len(self.choices)
        for position, choice in enumerate(self.choices):
            if choice.name in given:
                try:
                    row[position] = choice.code(given[choice.name])
                except SpaceError as error:
                    raise SpaceError(f"position {position}: {error}") from None
        codes = np.array([row], dtype=np.int64)
        active = self.active(codes)[0]
        for position, choice in enumerate(self.choices):
            if active[position] and choice.name not in given:
                raise SpaceError(
                    f"position {position}: choice {choice.name!r} is missing; allowed: {list(choice.options)}"
                )
        return [int(code) for code in self.canonical(codes)[0]]

    def decode(self, codes: Codes) -> list[Architecture]:
        """Return rows as architectures.

        Raises:
            SpaceError: A row has a wrong length or a code out of range.
        """
        self.validate(codes)
        codes = self.canonical(codes)
        active = self.active(codes)
        return [
            Architecture(
                self.name,
                tuple(
                    (choice.name, choice.options[code])
                    for choice, code, holds in zip(self.choices, row, flags, strict=True)
                    if holds
                ),
            )
            for row, flags in zip(codes.tolist(), active.tolist(), strict=True)
        ]

    def architecture(self, settings: Mapping[str, Option]) -> Architecture:
        """Return the architecture with these options; choices without effect may be left out."""
        row = self._encode(settings, self.name)
        return self.decode(np.array([row], dtype=np.int64))[0]

    def from_json(self, text: str) -> Architecture:
        """Read an architecture written by `Architecture.to_json`.

        Raises:
            SpaceError: Not JSON, of another space, or not an architecture of this space.
        """
        try:
            payload = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers too long and brackets too deep
            raise SpaceError(f"an architecture must be JSON: {error}") from None
        if not isinstance(payload, dict) or not isinstance(payload.get("choices"), dict):
            raise SpaceError('an architecture must be a JSON object {"space": ..., "choices": {...}}')
        return self.decode(np.array([self._encode(payload["choices"], payload.get("space", ""))]))[0]

    def validate(self, codes: Codes) -> None:
        """Refuse rows that are not of this space.

        Raises:
            SpaceError: Names the choice, its position and the allowed values.
        """
        if codes.ndim != 2 or codes.shape[1] != len(self.choices):
            raise SpaceError(
                f"codes of space {self.name!r} have shape (n, {len(self.choices)}), got {codes.shape}"
            )
        if not np.issubdtype(codes.dtype, np.integer):
            raise SpaceError(f"codes must be integers, got {codes.dtype}")
        wrong = np.argwhere((codes < 0) | (codes >= self.counts))
        if len(wrong):
            row, position = wrong[0].tolist()
            choice = self.choices[position]
            raise SpaceError(
                f"row {row}, position {position}: choice {choice.name!r} takes codes "
                f"0..{len(choice.options) - 1} for {list(choice.options)}, got {codes[row, position]}"
            )

    # Blocks ------------------------------------------------------------------------------------------

    def block_settings(self, block: Block) -> Iterator[Setting]:
        """Yield every joint setting of the choices of a block, last choice fastest."""
        yield from itertools.product(*(self.choices[self.positions[name]].options for name in block.choices))

    def covering_settings(self, block: Block) -> Iterator[Setting]:
        """Yield settings in which all that can occur in a block does.

        These are all, unless the block has parts: then those of each part, the other choices at their first
        option. A cell has a few dozen of them where it has millions of settings.
        """
        if not block.parts:
            yield from self.block_settings(block)
            return
        first = {name: self.choices[self.positions[name]].options[0] for name in block.choices}
        settings: dict[Setting, None] = {}
        for part in block.parts:
            for setting in self.block_settings(part):
                varied = first | dict(zip(part.choices, setting, strict=True))
                settings[tuple(varied[name] for name in block.choices)] = None
        yield from settings

    @cached_property
    def priced_blocks(self) -> tuple[Block, ...]:
        """What the cost of a network is the sum of: blocks, or the parts of those that have some."""
        return tuple(part for block in self.blocks for part in block.parts or (block,))

    def operations(self, codes: Codes) -> list[tuple[str, Ops]]:
        """Return name and operations of every active block of one architecture, in order.

        Args:
            codes: One row, shape `(1, choices)` or `(choices,)`.
        """
        return self._operations(self.blocks, codes)

    def priced_operations(self, codes: Codes) -> list[tuple[str, Ops]]:
        """Return name and operations of every active priced block of one architecture, see `operations`."""
        return self._operations(self.priced_blocks, codes)

    def cells(self, codes: Codes) -> list[CellSpec]:
        """Return the cells of one architecture, in order; most spaces have none."""
        return [
            op
            for _, ops in self._operations(self._cell_blocks, codes)
            for op in ops
            if isinstance(op, CellSpec)
        ]

    def connected(self, codes: Codes) -> bool:
        """Return whether the output of an architecture depends on its input: cells can be cut in two."""
        return all(cell.connected for cell in self.cells(codes))

    @cached_property
    def _cell_blocks(self) -> tuple[Block, ...]:
        """Blocks that are cells."""
        found = []
        for block in self.blocks:
            settings = (block.operations(*setting) for setting in self.block_settings(block))
            if any(isinstance(op, CellSpec) for op in next((ops for ops in settings if ops), ())):
                found.append(block)
        return tuple(found)

    def _operations(self, blocks: Sequence[Block], codes: Codes) -> list[tuple[str, Ops]]:
        row = codes.reshape(-1)
        result = []
        for block in blocks:
            positions = [self.positions[name] for name in block.choices]
            ops = block.operations(*(self.choices[p].options[int(row[p])] for p in positions))
            if ops:
                result.append((block.name, ops))
        return result

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits over choices and operations: equal exactly for equal spaces."""
        digest = hashlib.sha256(repr((self.name, self.choices)).encode())
        for choice in self.choices if self.edges else ():
            digest.update(repr((choice.terms, self.edges)).encode())
        for block in self.blocks:
            digest.update(repr((block.name, block.choices)).encode())
            for setting in self.covering_settings(block):
                digest.update(block_key(block.operations(*setting)).encode())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return what files must say of the space: name, settings, fingerprint."""
        return {"name": self.name, "settings": dict(self.settings), "fingerprint": self.fingerprint}

    def supernet(self) -> "Supernet":
        """Make the supernet of the space, randomly initialised."""
        if self.supernet_factory is not None:
            return self.supernet_factory(self)
        from autocompress.elastic.supernet import Supernet

        return Supernet(self)

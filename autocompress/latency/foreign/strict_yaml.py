"""YAML that is nothing but mappings, read from the events of the parser: nothing is constructed or executed.

PyYAML's `SafeLoader` keeps the last of two equal keys and follows aliases; events show both where they stand.
"""

from collections.abc import Iterator
from typing import Any, Final

import yaml

from autocompress.errors import TableError
from autocompress.latency.reading import number_or_text, shown, stands_twice
from autocompress.latency.strict import Node

# {resolution: {key: {mean: number}}} is the deepest structure of any format.
MAX_DEPTH: Final = 3

# libyaml's parser takes a tenth of the time.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str) -> Node:
    """Parse YAML that is mappings of mappings of plain numbers or texts, as tables are.

    Events of the parser are read and nothing is constructed: tags, anchors, aliases, lists and further
    documents are refused where they stand.

    Raises:
        TableError: It is no such YAML, or a key stands twice.
    """
    try:
        return Node(_tree(yaml.parse(text, Loader=_Loader)), "")
    except TableError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: characters that YAML does not allow, or that libyaml cannot encode.
        raise TableError(f"must be YAML, got {shown(text)}: {error}; it may be truncated") from None


def _tree(events: Iterator[Any]) -> dict[str, Any]:
    documents: list[dict[str, Any]] = []
    open_maps: list[dict[str, Any]] = []
    keys: list[str | None] = []
    for event in events:
        line = f"line {event.start_mark.line + 1}"
        if getattr(event, "tag", None) is not None or getattr(event, "anchor", None) is not None:
            raise TableError(f"{line}: tags, anchors and aliases are refused, got {shown(event)}")
        if isinstance(event, yaml.MappingStartEvent):
            new: dict[str, Any] = {}
            if not open_maps:
                documents.append(new)
            elif keys[-1] is None or len(open_maps) == MAX_DEPTH:
                raise TableError(f"{line}: a mapping must not be a key or {MAX_DEPTH + 1} levels deep")
            else:
                open_maps[-1][keys[-1]] = new
                keys[-1] = None
            open_maps.append(new)
            keys.append(None)
        elif isinstance(event, yaml.MappingEndEvent):
            open_maps.pop()
            keys.pop()
        elif isinstance(event, yaml.ScalarEvent) and open_maps:
            if keys[-1] is None:
                if event.value in open_maps[-1]:
                    raise stands_twice(event.value)
                keys[-1] = event.value
            else:
                open_maps[-1][keys[-1]] = number_or_text(event.value) if event.implicit[0] else event.value
                keys[-1] = None
        elif isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent):
            raise TableError(f"{line}: must be a mapping of keys to rows, got {shown(event)}")
    if len(documents) != 1:
        raise TableError(f"must have one document, got {len(documents)}")
    return documents[0]

"""TensorRT-LLM: the load balancer's YAML, with the experts of all slots of each layer."""

import importlib.util
from typing import Any

import numpy as np

from eplb_core._checks import require
from eplb_core._files import PathLike, reading, writing
from eplb_core.formats.values import layer_ids_of, placement_of

_BYTES_PER_CHARACTER = 1024
"""What parsing YAML takes at worst."""

_DEEPEST = 16
_MOST_KEYS = 4096
_MOST_SLOTS = 2**24
_LONGEST_SCALAR = 4096
_KEY = "initial_global_assignments"


def read_placement(path: PathLike, limit_bytes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement of a load balancer's configuration, or of one within `moe_config`.

    Layers are sorted by number; the numbers are `layer_ids`.
    """
    value = _read_yaml(path, limit_bytes)
    for key in ("moe_config", "load_balancer", "moe_load_balancer"):
        value = value.get(key, value) if isinstance(value, dict) else value
    require(
        isinstance(value, dict) and isinstance(value.get(_KEY), dict) and bool(value[_KEY]),
        f"`{path}` must map layers to lists of experts as `{_KEY}`",
        f"keys {sorted(map(str, value))[:8]}" if isinstance(value, dict) else f"{str(value)[:80]!r}",
        "If the balancer's configuration is in a file of its own, give that file.",
    )
    layers = {int(k) if isinstance(k, str) and k.isdecimal() else k: row for k, row in value[_KEY].items()}
    numbers = sorted(layer_ids_of(layers, path))
    rows = [layers[number] for number in numbers]
    require(  # an alias may repeat a long list in few characters
        all(isinstance(row, list) for row in rows) and sum(map(len, rows)) <= _MOST_SLOTS,
        f"`{path}` must map layers to lists of together at most {_MOST_SLOTS} experts",
        "more, or something else",
        "Check that the file is whole.",
    )
    flat = all(type(expert) is int for row in rows for expert in row)
    require(flat, f"`{path}` must map layers to lists of expert ids", "something else", "Check that the file is whole.")
    ids = placement_of(rows, path)
    require(
        value.get("num_slots") == ids.shape[1],
        f"`{path}` must state as num_slots how many experts it lists per layer",
        f"num_slots={value.get('num_slots')}, listed={ids.shape[1]}",
        "Check that the file is whole.",
    )
    info = {"ep_size": value["ep_size"]} if type(value.get("ep_size")) is int and value["ep_size"] > 0 else {}
    return ids, info | ({"layer_ids": numbers} if numbers != list(range(len(numbers))) else {})


def write_placement(path: PathLike, physical_to_logical: np.ndarray, layer_ids: list[int]) -> None:
    """Write a configuration that TensorRT-LLM starts from and keeps."""
    rows = "".join(f"  {layer}: {row}\n" for layer, row in zip(layer_ids, physical_to_logical.tolist(), strict=True))
    tail = f"layer_updates_per_iter: 0\nnum_slots: {physical_to_logical.shape[1]}\n"  # last, so that a cut is noticed
    with writing(path) as file:
        file.write(f"{_KEY}:\n{rows}{tail}".encode())


def _read_yaml(path: PathLike, limit_bytes: int) -> Any:
    require(
        importlib.util.find_spec("yaml") is not None,
        f"`{path}` needs PyYAML to be read",
        "no module yaml",
        "Install it with: pip install 'eplb[cli]'",
    )
    import yaml

    with reading(path, limit_bytes // _BYTES_PER_CHARACTER) as file:
        content = file.read().decode()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        _check_events(yaml, content, loader)
        return yaml.load(content, Loader=loader)


def _check_events(yaml: Any, content: str, loader: Any) -> None:
    """Refuse what makes a small YAML file large or slow: depth, merged mappings and mappings of very many keys."""
    open_mappings: list[int | None] = []
    for event in yaml.parse(content, Loader=loader):
        if isinstance(event, yaml.CollectionEndEvent):
            open_mappings.pop()
            continue
        if open_mappings and open_mappings[-1] is not None:
            open_mappings[-1] += 1
            if open_mappings[-1] > 2 * _MOST_KEYS:
                raise ValueError(f"a mapping of more than {_MOST_KEYS} keys")
        if isinstance(event, yaml.ScalarEvent) and (
            event.value == "<<" or event.tag not in (None, "!") or len(event.value) > _LONGEST_SCALAR
        ):
            raise ValueError(f"a merged mapping, a tag or a very long value at line {event.start_mark.line + 1}")
        if isinstance(event, yaml.CollectionStartEvent):
            open_mappings.append(0 if isinstance(event, yaml.MappingStartEvent) else None)
            if len(open_mappings) > _DEEPEST:
                raise ValueError(f"collections more than {_DEEPEST} deep")

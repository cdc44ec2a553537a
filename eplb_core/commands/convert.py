"""`eplb convert`: loads and placements from one format to another."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from eplb_core.commands._shared import (
    JsonFile,
    MaxGB,
    check_folder,
    console,
    examples,
    failing,
    limit_bytes,
    topology_of,
    write_json,
)

EPILOG = examples(
    "eplb convert expert_distribution_recorder_1.pt load.npz",
    "eplb convert recordings/ load.npz        (one .pt per rank)",
    "eplb convert init.json balancer.yaml --first-layer 3",
    "eplb convert placement.npz expert_map.json --to vllm-ascend",
)
_FORMATS = "npz, npy, json, csv, sglang, sglang-pt, tensorrt-llm or vllm-ascend"


class _Request(NamedTuple):
    """What to convert, and what the files do not say."""

    source: Path
    target: Path
    source_format: str | None
    target_format: str | None
    ranks: int | None
    nodes: int | None
    first_layer: int | None
    limit_bytes: int

    @property
    def formats(self) -> list[str | None]:
        """The formats that are asked for or told by the files' names, of source and target."""
        from eplb_core.formats.names import by_name

        return [self.source_format or by_name(self.source), self.target_format or by_name(self.target)]

    def layer_ids(self, num_layers: int) -> list[int] | None:
        """The model's numbers of the layers, if the first is known."""
        return None if self.first_layer is None else [self.first_layer + layer for layer in range(num_layers)]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A load trace or a placement.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", callback=check_folder, help="The file to write.")],
    source_format: Annotated[str | None, typer.Option("--from", help=f"Format of IN: {_FORMATS}.")] = None,
    target_format: Annotated[str | None, typer.Option("--to", help="Format of OUT, likewise.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="trace or placement, for a file of numbers that could be either.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks, where IN does not state them.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes, where IN does not state them.")] = None,
    first_layer: Annotated[
        int | None, typer.Option(min=0, help="The model's number of IN's first layer, where IN does not number them.")
    ] = None,
    max_gb: MaxGB = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Convert a load trace or a placement to another format.

    Formats are told from the files' names and contents; --from and --to override that. What the other format has no
    room for is left out.
    """
    request = _Request(source, target, source_format, target_format, ranks, nodes, first_layer, limit_bytes(max_gb))
    with failing("convert"):
        found = _kind(request, kind)
        result = {"kind": found} | (_convert_trace if found == "trace" else _convert_placement)(request)
    sizes = ", ".join(f"{value} {name}" for name, value in result.items() if name != "kind")
    console(json_file).print(f"{source} -> {target}: {found} of {sizes}")
    write_json(json_file, {"source": str(source), "target": str(target)} | result)


def _kind(request: _Request, wanted: str | None) -> str:
    """Tell whether the source is a trace or a placement: as asked for, by the formats, or by its contents."""
    from eplb_core._checks import EplbError, require
    from eplb_core.formats.arrays import names_of
    from eplb_core.trace import PLACEMENT_FORMATS, TRACE_FORMATS, read_placement, read_trace

    known = {"trace": TRACE_FORMATS, "placement": PLACEMENT_FORMATS}
    require(wanted in (None, *known), "`--kind` must be trace or placement", f"{wanted}", "Choose one, or neither.")
    possible = [kind for kind, formats in known.items() if all(name in (None, *formats) for name in request.formats)]
    if wanted is not None or len(possible) == 1:
        return wanted or possible[0]
    if request.formats[0] == "npz":
        return "placement" if "physical_to_logical" in names_of(request.source) else "trace"
    errors = {}
    for kind, read in (("trace", read_trace), ("placement", read_placement)):
        try:
            read(request.source, format=request.source_format, limit_bytes=request.limit_bytes)
        except EplbError as error:
            errors[kind] = error
    if len(errors) == 2:
        raise errors["trace"]
    require(bool(errors), f"`{request.source}` could be a trace or a placement", "no --kind", "Say which it is.")
    return "placement" if "trace" in errors else "trace"


def _convert_trace(request: _Request) -> dict[str, Any]:
    """Window by window where both formats can."""
    from eplb_core.trace import iter_windows, read_metadata, read_trace, write_trace

    reading: dict[str, Any] = {"format": request.source_format, "limit_bytes": request.limit_bytes}
    if request.formats[0] in ("npz", "npy") and request.formats[1] == "npz":
        windows: Any = iter_windows(request.source, **reading)
        metadata = {} if request.formats[0] == "npy" else read_metadata(request.source, **reading)
    else:
        windows, metadata = read_trace(request.source, **reading)
    windows = iter(windows)
    first = next(windows)
    num_windows = 0

    def counted() -> Iterator[Any]:
        nonlocal num_windows
        for window in chain([first], windows):
            num_windows += 1
            yield window

    numbers = {} if request.first_layer is None else {"layer_ids": request.layer_ids(len(first))}
    write_trace(request.target, counted(), numbers | metadata, format=request.target_format)
    return {"windows": num_windows, "layers": len(first), "experts": first.shape[1]}


def _convert_placement(request: _Request) -> dict[str, Any]:
    from eplb_core.trace import read_placement, write_placement

    stored = read_placement(request.source, format=request.source_format, limit_bytes=request.limit_bytes)
    ids, info = stored.physical_to_logical, stored.info
    ranks, nodes = request.ranks or info.get("ep_size"), request.nodes or info.get("num_nodes")
    write_placement(
        request.target,
        ids,
        topology_of(ids, ranks, nodes),
        format=request.target_format,
        num_logical=info.get("num_logical"),
        layer_ids=info.get("layer_ids") or request.layer_ids(len(ids)),
        metadata=info.get("metadata"),
    )
    return {"layers": len(ids), "slots": ids.shape[1]}

"""What commands have in common: options, how they fail, ask for an extra, and write machine-readable results."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from eplb_core.topology import Topology


def check_folder(file: Path | None) -> Path | None:
    """Refuse a file to write whose folder does not exist."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"the folder {file.parent} does not exist.")
    return file


def output(name: str, help: str) -> Any:
    """Return an option for a file to write; its folder must exist."""
    return typer.Option(name, metavar="FILE", dir_okay=False, writable=True, callback=check_folder, help=help)


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        dir_okay=False,
        writable=True,
        allow_dash=True,
        callback=check_folder,
        help="Write the results as JSON; - for standard output.",
    ),
]
LoadFile = Annotated[
    Path, typer.Argument(metavar="LOAD", help="Load trace: .npz, .npy, .json, .csv, or SGLang's .pt or its folder.")
]
Ranks = Annotated[int, typer.Option(min=1, help="Ranks of the expert-parallel group.")]
Redundant = Annotated[int, typer.Option(min=0, help="Slots per layer beyond one for each expert.")]
Nodes = Annotated[int, typer.Option(min=1, help="Hosts that the ranks are spread over evenly.")]
Groups = Annotated[int, typer.Option(min=1, help="Groups of experts that the router limits to few nodes.")]
MaxGB = Annotated[
    float, typer.Option(min=0, help="Most GB that a file, or of a large trace one window, may unpack to.")
]
Policy = Annotated[str, typer.Option(help="Policy of `rebalance`: greedy, refined or incremental.")]


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines that work."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def require_modules(extra: str, *modules: str) -> None:
    """End with exit code 2 and the extra to install, unless all modules can be found."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        fail(f"This command needs {' and '.join(missing)}. Install with: pip install 'eplb[{extra}]'", code=2)


def fail(message: str, *, code: int) -> NoReturn:
    """Print a message to stderr and end: code 2 for a request that cannot be met, 1 for work that went wrong."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


@contextmanager
def failing(command: str) -> Iterator[None]:
    """End with exit code 2 where the library refuses the request, with 1 where a file cannot be written."""
    from eplb_core._checks import EplbError

    try:
        yield
    except EplbError as error:
        fail(f"eplb {command}: {error}", code=2)
    except OSError as error:
        fail(f"eplb {command}: {error}", code=1)


def topology_for(num_logical: int, ranks: int, redundant: int, nodes: int) -> "Topology":
    """Return the topology of a group, or raise `EplbError` with the numbers of redundant experts that would do."""
    from eplb_core._checks import require
    from eplb_core.topology import Topology

    slots = num_logical + redundant
    fewer, more = slots // ranks * ranks - num_logical, -(-slots // ranks) * ranks - num_logical
    require(
        slots % ranks == 0,
        "`--redundant` must make the slots of a layer a multiple of the ranks",
        f"{num_logical} experts + {redundant} redundant on {ranks} ranks",
        f"Use --redundant {more}{f' or {fewer}' if fewer >= 0 else ''}.",
    )
    return Topology(ranks, slots // ranks, nodes)


def topology_of(physical_to_logical: "np.ndarray", ranks: int | None, nodes: int | None) -> "Topology | None":
    """Return the topology of a placement from a file, or None if the number of ranks is unknown."""
    from eplb_core._checks import require
    from eplb_core.topology import Topology

    if ranks is None:
        return None
    slots = physical_to_logical.shape[1]
    require(
        slots % ranks == 0,
        "`--ranks` must divide the slots of a layer",
        f"{slots} slots, {ranks} ranks",
        "Check how many ranks the placement is for.",
    )
    return Topology(ranks, slots // ranks, nodes or 1)


def limit_bytes(gigabytes: float) -> int:
    """Return the limit that readers take."""
    return int(gigabytes * 2**30)


def console(json_file: Path | None) -> "Console":
    """Return where to print for people: stderr if the JSON goes to standard output."""
    require_modules("cli", "rich")
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, stderr=_is_dash(json_file))


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write a result, if a file was asked for."""
    if file is None:
        return
    if _is_dash(file):
        typer.echo(json.dumps(result))
    else:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _is_dash(file: Path | None) -> bool:
    return file is not None and str(file) == "-"

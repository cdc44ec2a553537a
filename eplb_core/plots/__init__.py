"""Pictures of traces, placements and replays. Each function fills a figure and returns it; `save` writes it.

Needs matplotlib (`pip install 'eplb[cli]'`), which is imported when a picture is drawn. Nothing is shown on a screen
and no global state of matplotlib is touched. Colours are told apart with any colour vision, and never alone.
"""

from eplb_core.plots.frontier import frontier
from eplb_core.plots.losses import losses
from eplb_core.plots.overview import overview
from eplb_core.plots.ranks import rank_loads
from eplb_core.plots.replicas import replicas
from eplb_core.plots.style import png, save
from eplb_core.plots.timeline import timeline
from eplb_core.plots.transfers import transfers

__all__ = ("frontier", "losses", "overview", "png", "rank_loads", "replicas", "save", "timeline", "transfers")

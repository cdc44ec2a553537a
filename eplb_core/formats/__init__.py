"""The file formats of loads and placements, one module each. `eplb_core.trace` picks among them."""

"""The main job on a real model: train it, spread it over processes, shift its traffic, keep its ranks balanced."""

"""Run all benchmarks: `python -m benchmarks`."""

from benchmarks import elastic, estimators, executor, frontier, planning, plugs, replay, runtime, sharded, shares

PARTS = {
    "Planning time": planning,
    "Balance against moves": frontier,
    "Load estimators": estimators,
    "The runtime": runtime,
    "Shares and locality": shares,
    "Replays": replay,
    "Plugs for vLLM and SGLang": plugs,
    "Executor": executor,
    "Sharded JAX arrays": sharded,
    "Groups that change": elastic,
}

if __name__ == "__main__":
    for title, part in PARTS.items():
        print(f"\n# {title}\n", flush=True)
        part.main()

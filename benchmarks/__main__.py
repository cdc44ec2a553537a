"""Run all benchmarks: `python -m benchmarks`."""

from benchmarks import executor, frontier, planning

if __name__ == "__main__":
    print("# Planning time\n")
    planning.main()
    print("\n# Balance against moves\n")
    frontier.main()
    print("\n# Executor\n")
    executor.main()

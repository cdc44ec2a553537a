"""Run all benchmarks: `python -m benchmarks`."""

from benchmarks import frontier, planning

if __name__ == "__main__":
    print("# Planning time\n")
    planning.main()
    print("\n# Balance against moves\n")
    frontier.main()

"""The commands of `eplb`. A command imports what it needs when it runs, so that `eplb --help` is quick."""

import typer

from eplb_core.commands import advise, convert, demo, plan, report, simulate, verify

app = typer.Typer(name="eplb", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def eplb() -> None:
    """Expert-parallelism load balancing for mixture-of-experts serving."""


app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=verify.EPILOG)(verify.verify)
app.command(epilog=convert.EPILOG)(convert.convert)
app.command(epilog=simulate.EPILOG)(simulate.simulate)
app.command(epilog=advise.EPILOG)(advise.advise)
app.command(epilog=report.EPILOG)(report.report)
app.command()(demo.demo)

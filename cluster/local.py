"""A Ray cluster of several nodes on one machine, made of processes of its own.

    eval "$(python cluster/local.py start --nodes 2)"
    ray job submit --working-dir . -- python -m b2ray.run --config configs/quickstart.yaml
    python cluster/local.py stop

Each node is one `ray start --block` in a session of its own; a state folder remembers them. Lines
that a shell evaluates go to stdout, what a person reads to stderr. Ray's own stop command would end
every Ray on the machine; this one ends what it started and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
MIN_OBJECT_STORE = 80  # MiB; Ray starts no node with less
GRACE = 15.0  # seconds that a node may take to end
STOP_WAIT = "60"  # seconds that `ray job stop` gives a run to end resumably; Ray's own are 3
# Of the caller's environment these would lead our nodes to another cluster.
FOREIGN = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"),
)
# A Unix socket's name has at most 107 bytes, and this is how Ray names one below a node's folder.
LONGEST_STATE = 107 - len("/node99/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


class Refused(Exception):
    """What was asked cannot be done: one sentence with the remedy."""


@dataclass(frozen=True)
class Node:
    """One `ray start --block`; its pid may belong to another process after it died."""

    name: str
    pid: int
    started: float

    def process(self) -> psutil.Process | None:
        """The process if it is alive and the one that was started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid)
            # Start times are counted from the boot time, which clock corrections move a little.
            same = abs(found.create_time() - self.started) < 2
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        return None


@dataclass
class Cluster:
    """What the state folder remembers."""

    nodes: list[Node]
    address: str
    dashboard: str
    auth: str

    @property
    def dead(self) -> list[str]:
        """Names of the nodes whose process is gone."""
        return [node.name for node in self.nodes if node.process() is None]


class State:
    """The folder with the cluster's description, token, logs and Ray's own files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        if len(os.fsencode(self.folder)) > LONGEST_STATE:
            raise Refused(
                f"--state {self.folder} is longer than {LONGEST_STATE} bytes, too long for the "
                "names of Ray's sockets: give a shorter folder"
            )
        self.token = self.folder / "token"
        self._file = self.folder / "cluster.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = self.folder.stat()
            # It holds the token and says which processes to end.
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise Refused(
                    f"--state {self.folder} can be written by other users: give one of your own"
                )
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise Refused(
                f"--state {self.folder} cannot be used ({error.strerror}): give another folder"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise Refused(
                    f"another command is at work on {self.folder}: wait for it, or give another "
                    "--state"
                ) from error
            yield

    def read(self) -> Cluster | None:
        """The cluster that was started here and not stopped."""
        if not self._file.exists():
            return None
        values = json.loads(self._file.read_text())
        nodes = [Node(**node) for node in values.pop("nodes")]
        return Cluster(nodes, **values)

    def write(self, cluster: Cluster) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(asdict(cluster)))
        part.replace(self._file)

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)
        self.token.unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def ray(self, name: str) -> Path:
        """Where a node keeps its logs, sockets and copies of working directories.

        Nodes that share a folder replace a job's working directory under its feet.
        """
        return self.folder / name

    def exports(self, cluster: Cluster) -> dict[str, str]:
        """The variables with which Ray's commands and b2ray find the cluster."""
        found = {
            "RAY_ADDRESS": cluster.address,
            "RAY_API_SERVER_ADDRESS": f"http://{cluster.dashboard}",
            "RAY_AUTH_MODE": cluster.auth,
        }
        return found | ({"RAY_AUTH_TOKEN_PATH": str(self.token)} if cluster.auth == "token" else {})


def start(state: State, options: argparse.Namespace) -> None:
    """Start a head and its workers, and wait until Ray counts them all."""
    old = state.read()
    if old and len(old.dead) < len(old.nodes):
        raise Refused(
            f"a cluster is running from {state.folder} already: use it (`status` prints how), "
            "`stop` it first, or give another --state"
        )
    port = _port(options.port, "--port", "")
    dashboard = _port(options.dashboard_port, "--dashboard-port", LOOPBACK)
    for folder in (state.ray("head"), *state.folder.glob("node*/")):  # logs of the cluster before
        shutil.rmtree(folder, ignore_errors=True)
    cluster = Cluster([], "", f"{LOOPBACK}:{dashboard}", options.auth)
    if options.auth == "token":
        state.token.unlink(missing_ok=True)
        with os.fdopen(os.open(state.token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
            f.write(secrets.token_hex(32))
    until = time.monotonic() + options.timeout
    try:
        _launch(state, cluster, "head", options, *_head(port, dashboard))
        address = state.ray("head") / "ray_current_cluster"
        _wait(state, cluster, until, "the head", lambda: address.exists() and address.read_text())
        cluster.address = address.read_text().strip()
        for n in range(1, options.nodes):
            _launch(state, cluster, f"node{n}", options, f"--address={cluster.address}")
        what = f"{options.nodes} nodes"
        _wait(state, cluster, until, what, lambda: _alive(state, cluster) >= options.nodes)
    except BaseException:
        _end(cluster)
        state.forget()
        raise
    _say(f"{options.nodes} nodes with {options.cpus} CPU and {options.gpus} GPU each are alive")
    _print(state, cluster)


def status(state: State, _options: argparse.Namespace) -> None:
    """Say which nodes are alive, and print the variables again."""
    cluster = state.read()
    if cluster is None:
        raise Refused(f"no cluster is running from {state.folder}: `start` makes one")
    for node in cluster.nodes:
        _say(f"{node.name}: process {node.pid} {'is alive' if node.process() else 'is dead'}")
    if "head" in cluster.dead:
        raise Refused(f"the head is dead ({state.log('head')} may say why): `stop`, then `start`")
    _say(f"Ray counts {_alive(state, cluster)} of {len(cluster.nodes)} nodes")
    _print(state, cluster)


def stop(state: State, _options: argparse.Namespace) -> None:
    """End the nodes and all that they started."""
    cluster = state.read()
    if cluster is None:
        _say(f"no cluster is running from {state.folder}: nothing to stop")
        return
    dead = cluster.dead
    _end(cluster)
    state.forget()
    gone = f" ({', '.join(dead)} had died before)" if dead else ""
    _say(f"stopped {len(cluster.nodes)} nodes{gone}; logs stay in {state.folder} until a start")


def _head(port: int, dashboard: int) -> Sequence[str]:
    return (
        *("--head", f"--port={port}", "--disable-usage-stats", "--include-dashboard=True"),
        *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"),
        f"--ray-client-server-port={_port(0, '', '')}",  # the fixed one may be another cluster's
    )


def _launch(
    state: State, cluster: Cluster, name: str, options: argparse.Namespace, *more: str
) -> None:
    """Start one node in a session of its own, so that it outlives this command."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *more),
        f"--temp-dir={state.ray(name)}",
        f"--num-cpus={options.cpus}",
        f"--num-gpus={options.gpus}",
        f"--object-store-memory={options.object_store_mib * 2**20}",
        # Any free port: the fixed defaults belong to the first node of a machine.
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]
    env = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    # A job's `python` is the first one in the head's PATH.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["RAY_AUTH_MODE"] = options.auth
    if options.auth == "token":
        env["RAY_AUTH_TOKEN_PATH"] = str(state.token)
    env.setdefault("RAY_JOB_STOP_WAIT_TIME_S", STOP_WAIT)
    with state.log(name).open("w") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = psutil.Process(process.pid).create_time()
    cluster.nodes.append(Node(name, process.pid, started))
    state.write(cluster)


def _wait(
    state: State, cluster: Cluster, until: float, what: str, done: Callable[[], object]
) -> None:
    """Wait for something, a bounded time, while the nodes live."""
    said = time.monotonic()
    while not done():
        for name in cluster.dead:
            lines = state.log(name).read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise Refused(
                f"{name} ended while it started, and said last: {lines[-1].strip()} (all of it: "
                f"{state.log(name)})"
            )
        if time.monotonic() > until:
            raise Refused(
                f"{what} did not come up in time, the logs are in {state.folder}: start fewer "
                "nodes, or give a longer --timeout"
            )
        if time.monotonic() - said > 10:
            said = time.monotonic()
            _say(f"waiting for {what}")
        time.sleep(0.2)


def _alive(state: State, cluster: Cluster) -> int:
    """How many nodes Ray counts; 0 while it does not answer."""
    os.environ.update(state.exports(cluster))
    if cluster.auth == "token":
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would go before the token's file
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    address = f"http://{cluster.dashboard}"
    try:
        return len(list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=5))
    except (OSError, RuntimeError, RayStateApiException):
        return 0


def _end(cluster: Cluster) -> None:
    """Terminate the nodes, then kill what is left of them and their descendants."""
    heads = [found for node in cluster.nodes if (found := node.process())]
    family = list(heads)
    for process in heads:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    for process in heads:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(family, timeout=GRACE)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE)


def _port(wanted: int, option: str, host: str) -> int:
    """The wanted port if it is free, or any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise Refused(
                f"{option} {wanted} cannot be used ({error.strerror}): give another port, or 0 for "
                "any free one"
            ) from error
        return int(probe.getsockname()[1])


def _print(state: State, cluster: Cluster) -> None:
    for name, value in state.exports(cluster).items():
        print(f"export {name}={shlex.quote(value)}")
    if cluster.auth == "token":
        print("unset RAY_AUTH_TOKEN")  # would go before the token's file


def _say(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    default = Path(tempfile.gettempdir()) / f"b2ray-{os.getuid()}"
    for command, does in (("start", start), ("status", status), ("stop", stop)):
        one = commands.add_parser(command, help=does.__doc__)
        one.set_defaults(does=does)
        one.add_argument(
            "--state", type=Path, default=default, help=f"folder of the cluster ({default})"
        )
        if command == "start":
            _start_arguments(one)
    return parser


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    def within(low: int, high: int = 2**31) -> Callable[[str], int]:
        def number(text: str) -> int:
            if not low <= (value := int(text)) <= high:
                raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
            return value

        return number

    port = within(0, 2**16 - 1)
    for name, kind, default, meaning in (
        ("--nodes", within(1), 2, "nodes, the head among them"),
        ("--cpus", within(1), 2, "CPUs that each node offers, real or not"),
        ("--gpus", within(0), 0, "GPUs that each node offers, real or not"),
        ("--port", port, 0, "the head's port; 0 is any free one"),
        ("--dashboard-port", port, 0, "the dashboard's port; 0 is any free one"),
        ("--object-store-mib", within(MIN_OBJECT_STORE), 512, "shared memory of each node"),
        ("--timeout", float, 120.0, "seconds within which all nodes must be alive"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} ({default})")
    parser.add_argument(
        "--auth", choices=("token", "disabled"), default="token", help="Ray's authentication"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it did what was asked, else 2."""
    options = _arguments().parse_args(argv)
    try:
        state = State(options.state)
        with state.locked():
            options.does(state, options)
    except Refused as error:
        _say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

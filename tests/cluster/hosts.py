"""Two hosts on one machine: network namespaces with addresses of their own, and an ssh server in the second."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
RAY = "/tmp/dllm-ray"
PRIVATE = 'mount -t tmpfs ray "$0" && exec "$@"'
TOOLS = ("ip", "sshd", "ssh", "ssh-keygen")


def missing() -> str:
    """Why there can be no such hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"not installed: {', '.join(tools)} (iproute2, openssh-server)" if tools else ""


@dataclass(frozen=True)
class Host:
    """A namespace."""

    name: str
    address: str

    def start(self, command: Sequence[object], log: Path, **environment: object) -> subprocess.Popen:
        """Start a command on the host, its output in a file."""
        variables = os.environ | {key: str(value) for key, value in environment.items()} | {"RAY_TMPDIR": RAY}
        Path(RAY).mkdir(exist_ok=True)
        with log.open("ab") as stream:
            return subprocess.Popen(
                # Ray's sockets lie in files, which hosts do not share: a file system of its own for every command
                ["ip", "netns", "exec", self.name, "sh", "-c", PRIVATE, RAY, *map(str, command)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=variables,
            )

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(line) for line in listed.stdout.split()]

    def kill(self) -> None:
        """As if its power failed: every process of the host ends at once."""
        while running := self.processes():
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The two, joined by a cable; every process in them is ended in the end."""
    hosts = tuple(Host(f"dllm{os.getpid()}n{n}", address) for n, address in enumerate(ADDRESSES))
    try:
        for host in hosts:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        cable = [f"d{os.getpid() % 100000}n{n}" for n in range(2)]
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for host, end in zip(hosts, cable):
            ip("link", "set", end, "netns", host.name)
            ip("-n", host.name, "link", "set", end, "name", "eth0")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill()
                ip("netns", "del", host.name)


def ssh_server(host: Host, folder: Path) -> list[str]:
    """Start an ssh server on the host; the command that reaches it."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": 2222,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": folder / "sshd.pid",
        "PermitRootLogin": "yes",
        "UsePAM": "no",
        "StrictModes": "no",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    host.start([server, "-D", "-e", "-f", folder / "sshd_config"], folder / "sshd.log")
    options = ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    chosen = [part for option in options for part in ("-o", option)]
    return ["ssh", "-p", "2222", "-i", str(folder / "user"), *chosen]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

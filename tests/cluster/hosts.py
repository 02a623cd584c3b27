"""Hosts on one machine: network namespaces with addresses of their own, and an ssh server in one of them."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"  # the first host is 10.77.0.1
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
def joined_hosts(count: int) -> Iterator[tuple[Host, ...]]:
    """So many, joined by a switch; every process in them is ended in the end."""
    prefix = f"dllm{os.getpid()}"
    hosts = tuple(Host(f"{prefix}n{n}", f"{NETWORK}.{n + 1}") for n in range(count))
    switch = f"{prefix}switch"  # a namespace too: this machine's own network is left alone
    try:
        for name in (switch, *(host.name for host in hosts)):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for n, host in enumerate(hosts):
            ip("-n", switch, "link", "add", f"port{n}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("-n", switch, "link", "set", f"port{n}", "master", "bridge", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill()
                ip("netns", "del", host.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", switch)


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

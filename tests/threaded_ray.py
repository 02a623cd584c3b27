"""Ray as far as engines elsewhere need it, in this process: an actor is an object with a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from types import SimpleNamespace
from typing import Any

Dies = Callable[[str, str, tuple], bool]  # of a node, a method and its arguments


class RayActorError(Exception):
    """The actor is gone."""


class RayTaskError(Exception):
    """What an actor raised."""

    def __init__(self, cause: BaseException):
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    """An object whose methods run in its thread, but `kinds` at once."""

    def __init__(self, made: object, node: str, dies: Dies):
        self.made, self.node, self.dies = made, node, dies
        self.thread = ThreadPoolExecutor(1)
        self.dead = False
        self.calls: list[tuple[str, tuple]] = []

    def call(self, name: str, arguments: tuple) -> object:
        self.calls.append((name, arguments))
        self.dead = self.dead or self.dies(self.node, name, arguments)
        try:
            result = None if self.dead else getattr(self.made, name)(*arguments)
        except Exception as error:
            raise RayTaskError(error) from error
        if self.dead:
            raise RayActorError
        return result

    def __getattr__(self, name: str) -> SimpleNamespace:
        def remote(*arguments: object) -> Future:
            result = self.thread.submit(self.call, name, arguments)
            if name == "kinds":
                wait_for([result])
            return result

        return SimpleNamespace(remote=remote)


class Ray:
    """The module. `here` are the nodes that are there, each with a processor for one actor."""

    def __init__(self, here: list[str], dies: Dies = lambda *_: False):
        self.here, self.dies = here, dies
        self.actors: dict[str, Actor] = {}  # by node
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
        self.exceptions = SimpleNamespace(
            RayActorError=RayActorError, ObjectLostError=RayActorError, RayTaskError=RayTaskError
        )

    def nodes(self) -> list[dict]:
        return [{"NodeID": name, "NodeManagerAddress": name} for name in self.here]

    def remote(self, cls: type) -> SimpleNamespace:
        def options(node: str, **_: object) -> SimpleNamespace:
            def remote(*arguments: object) -> Actor:
                self.actors[node] = Actor(cls(*arguments), node, self.dies)
                return self.actors[node]

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)

    def wait(self, results: list[Future], num_returns: int = 1, timeout: float | None = None) -> tuple[list, list]:
        done, _ = wait_for(results, timeout, "FIRST_COMPLETED" if num_returns == 1 else "ALL_COMPLETED")
        return [one for one in results if one in done], [one for one in results if one not in done]

    def get(self, result: Future) -> Any:
        return result.result()

    def kill(self, actor: Actor) -> None:
        actor.dead = True

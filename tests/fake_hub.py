"""A hub that records what it is asked."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import huggingface_hub

real = huggingface_hub.HfApi


class FakeApi:
    """Takes the arguments of the real one and no others."""

    user: dict[str, Any] = {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
    fails: dict[str, Exception] = {}
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def _called(self, name: str, *args: Any, **kwargs: Any) -> Any:
        inspect.signature(getattr(real, name)).bind(self, *args, **kwargs)
        if name in self.fails:
            raise self.fails[name]
        self.calls.append((name, args, kwargs))

    def whoami(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._called("whoami", *args, **kwargs)
        return self.user

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        self._called("create_repo", *args, **kwargs)

    def create_commit(self, *args: Any, **kwargs: Any) -> Any:
        self._called("create_commit", *args, **kwargs)
        return SimpleNamespace(repo_url=f"https://huggingface.co/{args[0]}")


def uploaded(api: type[FakeApi]) -> dict[str, bytes]:
    """File -> content of the one commit."""
    ((_, _, operations),) = [(name, args[0], args[1]) for name, args, _ in api.calls if name == "create_commit"]
    contents = {}
    for operation in operations:
        with operation.as_file() as file:
            contents[operation.path_in_repo] = file.read()
    return contents

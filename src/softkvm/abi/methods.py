# SPDX-License-Identifier: Apache-2.0
"""The methods of requests, with their arguments checked by the table of requests.

Both KVMs' classes get this: what is wrong with an argument is said alike, before anything has been done.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from softkvm.abi.requests import Request, method_name


def checked(method: Callable[..., Any], request: Request) -> Callable[..., Any]:
    """Return ``method``, which does ``request``, with its arguments checked and complete: defaults are filled in."""
    signature = inspect.signature(method)
    parameters = list(signature.parameters.values())[1:]
    names = tuple(parameter.name for parameter in parameters)
    complete = all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    argument = request.argument
    assert argument is not None
    accept = argument.accept

    @functools.wraps(method)
    def with_checks(self: object, *args: object, **named: object) -> Any:
        if named or not complete or len(args) != len(names):
            try:
                bound = signature.bind(self, *args, **named)
            except TypeError as error:
                raise TypeError(f"{method.__name__}(): {error}") from None
            bound.apply_defaults()
            args = bound.args[1:]
        return method(self, *accept(names, args))

    return with_checks


def check_requests(cls: type, requests: Mapping[str, Request], *, but: Collection[str] = ()) -> None:
    """Let the methods of *cls* that do *requests* check their arguments; those without arguments stay as they are.

    Methods named in *but* do it themselves: it doubles the time of the shortest.
    """
    for request_name, request in requests.items():
        name = method_name(request_name)
        method = getattr(cls, name, None)
        if request.argument is None or method is None or name in but:
            continue
        if len(inspect.signature(method).parameters) > 1:
            setattr(cls, name, checked(method, request))

# SPDX-License-Identifier: Apache-2.0
"""The clients of ``docs/examples``, one a language, linked either way, run a guest under ``softkvm exec``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.clients import TIMEOUT_S, run_client

from softkvm.client.program import needs_loader, resolve

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
RUSTC = ("rustc", "--edition", "2021")
#: The kernel's headers behind musl's own.
MUSL = ("musl-gcc", "-idirafter", "/usr/include", "-idirafter", f"/usr/include/{os.uname().machine}-linux-gnu")

#: By name: the source, whether the loader has to run it, and what makes it, before ``-o PROGRAM SOURCE``.
COMPILERS = {
    "C": ("hello.c", False, ("cc",)),
    "C, static": ("hello.c", True, ("cc", "-static")),
    "C, musl": ("hello.c", True, MUSL),
    "C, musl, static": ("hello.c", True, (*MUSL, "-static")),
    "Rust": ("hello.rs", False, RUSTC),
    "Rust, static": ("hello.rs", True, (*RUSTC, "-C", "target-feature=+crt-static")),
    "Go": ("hello.go", True, ("go", "build", "-ldflags=-linkmode=external")),
    "Go, static": ("hello.go", True, ("go", "build")),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_client_in_a_language_runs_its_guest(name: str, tmp_path: Path) -> None:
    source, loaded, compiler = COMPILERS[name]
    if not shutil.which(compiler[0]):
        pytest.skip(f"no {compiler[0]}")
    program = tmp_path / "hello"
    cgo = "0" if "static" in name else "1"
    settings = {"CGO_ENABLED": cgo, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOCACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **settings}
    subprocess.run([*compiler, "-o", program, EXAMPLES / source], check=True, env=environment, timeout=5 * TIMEOUT_S)
    assert needs_loader(resolve(str(program), [""])) is loaded
    done = run_client([program], tmp_path / "requests", "KVM_RUN")
    language = name.partition(",")[0]
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"hello from {language}\n")

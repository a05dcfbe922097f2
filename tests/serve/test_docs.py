"""What docs/serving.md tells to run runs, against a server that listens."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serve.running import Server, alone, running
from tgate_runtime.session import Session

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
HERE = "http://localhost:8000"


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Server]:
    with running(session, rows=4) as found:
        yield found


def run(language: str, block: str, server: Server, folder: Path) -> str:
    """What a block prints, with the server's address in place of the documentation's."""
    assert HERE in block
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
    done = subprocess.run(
        [*program, block.replace(HERE, server.url)], cwd=folder, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_picture(server: Server, session: Session, tmp_path: Path) -> None:
    language, block = BLOCKS[0]
    run(language, block, server, tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "star.png").convert("RGB"))
    np.testing.assert_array_equal(drawn, alone(session, "a green star above a red disk", seed=7)[0])


def test_openais_client(server: Server, tmp_path: Path) -> None:
    language, block = next(each for each in BLOCKS if each[0] == "python")
    assert run(language, block, server, tmp_path).split() == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]


def test_every_parameter_is_told_and_no_other(server: Server) -> None:
    asked = server.http.get("/openapi.json").json()["components"]["schemas"]["ImageAsked"]["properties"]
    table = PAGE.split("## What a request says")[1].split("\n**")[0]
    told = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert told == set(asked)


def test_every_option_is_told() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "tgate_engine", "serve", "--help"], text=True, capture_output=True, check=True
    ).stdout
    options = set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
    common = {"--help", "--quiet", "--traceback", "--device", "--architecture", "--precision"}  # of every engine
    assert options - common <= set(re.findall(r"`(--[a-z-]+)`", PAGE))

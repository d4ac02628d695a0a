"""`moeflow runtime doctor`: what this machine can do, what is missing, and what to do about it."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

WIDTH = 100  # of printed lines. Chosen here


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False) -> None:
    """Say what this machine can do with offloaded models; exit status 3 when it can run none."""
    from .doctor import examine

    able, found = examine()
    if as_json:
        values = [{key: value for key, value in asdict(one).items() if value not in ("", None)} for one in found]
        print(json.dumps({"can_run": able, "findings": values}, indent=2))
    else:
        for one in found:
            sign = {True: "ok", False: "!!", None: "--"}[one.fine]
            _say(f"{sign} {one.name}: {one.says}" + (f" {one.do}" if one.do else ""))
            if one.name == "families" and one.facts:
                _say(f"   served: {', '.join(one.facts['served'])}")
                for family, why in one.facts["refused"].items():
                    _say(f"   refused: {family}, {why}")
        print("Models can run here." if able else "No model can run here before what is marked !! above is mended.")
    if not able:
        raise typer.Exit(3)


def _say(text: str) -> None:
    print(textwrap.fill(text, WIDTH, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False))

"""The demo's report, as plain text of a given width."""

from __future__ import annotations

import textwrap

from fleet.demo import DemoResult

PROMPT = "    def close(self):\n        "
BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#%"  # for a terminal that has no others


def render(result: DemoResult, width: int, bars: str = BARS) -> str:
    """Text, verdicts, load table, measurements. `bars` are characters from low to high."""
    parts = [
        _heading("Text", width),
        textwrap.indent(result.prompt + result.remote.text, "  "),
        "",
        _heading("Checks", width),
        *_checks(result),
        "",
        _heading("Load: assignments of each expert", width),
        *_load(result, bars),
        "",
        _heading("Measured on this machine", width),
        *_measured(result),
    ]
    return "\n".join(parts)


def _heading(text: str, width: int) -> str:
    return f"{text} ".ljust(width, "-")


def _checks(result: DemoResult) -> list[str]:
    kill = result.kill
    return [
        _verdict(
            result.remote.text == result.reference.text,
            "text with every feed-forward layer in the cluster equals the in-process model's",
        ),
        _verdict(
            kill.generation.text == result.reference.text,
            f"the same text with {kill.server_id} (pid {kill.pid}) killed at token "
            f"{kill.at_token}; {kill.retried_pairs} (row, expert) pairs were sent again",
        ),
        _verdict(
            result.rpcs == result.ffn_layers * result.forward_passes,
            f"{result.rpcs} RPCs = {result.ffn_layers} layers x {result.forward_passes} forward "
            "passes",
        ),
        _verdict(
            result.client_parameters < result.model_parameters,
            f"the client holds {result.client_parameters / 1e6:.2f} M of "
            f"{result.model_parameters / 1e6:.2f} M parameters: no expert's",
        ),
    ]


def _verdict(holds: bool, text: str) -> str:
    return f"  {'ok ' if holds else 'NO '} {text}"


def _load(result: DemoResult, bars: str) -> list[str]:
    lines = [f"  {'layer':>5}  {'MaxVio':>6}  {'busiest':>12}  {'idlest':>12}  experts 0 .. E-1"]
    for layer, counts in sorted(result.counts.items()):
        high, low = max(counts), min(counts)
        shown = "".join(bars[round(count / max(high, 1) * (len(bars) - 1))] for count in counts)
        lines.append(
            f"  {layer:>5}  {result.maxvio[layer]:>6.2f}  "
            f"{f'{high} (#{counts.index(high)})':>12}  {f'{low} (#{counts.index(low)})':>12}  "
            f"|{shown}|"
        )
    return lines


def _measured(result: DemoResult) -> list[str]:
    rows = [
        ("launch to READY", f"{result.ready_s:.1f} s"),
        ("token in one process, median", f"{result.reference.median_ms:.1f} ms"),
        ("token through the cluster, median", f"{result.remote.median_ms:.1f} ms"),
        ("one layer's RPC, one row, median", f"{result.rpc_ms:.2f} ms"),
        ("longest token, quiet", f"{result.remote.longest_ms:.0f} ms"),
        ("longest token while a server was killed", f"{result.kill.generation.longest_ms:.0f} ms"),
    ]
    return [f"  {name:<42} {value:>9}" for name, value in rows]

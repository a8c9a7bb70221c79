"""Arrow Flight's DoExchange as an echo. Needs pyarrow and numpy, and nothing of ours.

python benchmarks/flight_echo.py                    # a server: prints LISTENING host:port
python benchmarks/flight_echo.py HOST:PORT          # a client: for each line "BYTES COUNT" on its
                                                    # standard input, the seconds that each took
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

_SCHEMA = pa.schema([("data", pa.uint8())])


class _Echo(flight.FlightServerBase):  # type: ignore[misc]
    def do_exchange(self, _: Any, __: Any, reader: Any, writer: Any) -> None:
        """Sends every record batch back as it came."""
        writer.begin(_SCHEMA)
        for chunk in reader:
            writer.write_batch(chunk.data)


def _client(address: str) -> None:
    with flight.connect(f"grpc://{address}") as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"echo"))
        writer.begin(_SCHEMA)
        for line in sys.stdin:
            size, count = map(int, line.split())
            payload = np.arange(size, dtype=np.uint32).astype(np.uint8)
            batch = pa.record_batch([pa.array(payload)], schema=_SCHEMA)
            seconds = []
            for _ in range(count):
                start = time.perf_counter()
                writer.write_batch(batch)
                answer = reader.read_chunk().data
                seconds.append(time.perf_counter() - start)
            right = bool(np.array_equal(answer.column(0).to_numpy(), payload))
            print(json.dumps({"seconds": seconds, "right": right}), flush=True)
        writer.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _client(sys.argv[1])
    else:
        with _Echo("grpc://127.0.0.1:0") as server:
            print(f"LISTENING 127.0.0.1:{server.port}", flush=True)
            server.serve()
